import { readdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { archCase, fixture, testEnv, type RawTensor } from '../arch/support.js';
import { llamaScore } from './llama.js';
import { convert, ourLogits, someTokens, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();

type Edit = NonNullable<Parameters<typeof archCase>[1]>;
type Tensors = Map<string, RawTensor>;

/** Sets keys of the config; `rope`: of its rotary parameters. */
const set =
  (values: Record<string, unknown>, rope: Record<string, unknown> = {}): NonNullable<Edit['config']> =>
  (config) => {
    Object.assign(config, values);
    Object.assign(config.rope_parameters as object, rope);
  };

const without = (tensors: Tensors, part: RegExp): void => {
  for (const name of [...tensors.keys()]) if (part.test(name)) tensors.delete(name);
};

/** Every layer gets the mixture of the one that has one. */
function allSparse(tensors: Tensors): void {
  without(tensors, /\.mlp\.(gate|up|down)_proj\./);
  const [, from] = /layers\.(\d)\..*experts\.0/.exec([...tensors.keys()].join('\n'))!;
  for (const name of [...tensors.keys()]) {
    const layer = /layers\.(\d)\.input_layernorm/.exec(name)?.[1];
    if (layer === undefined) continue;
    for (const [key, tensor] of [...tensors]) {
      if (key.startsWith(`model.layers.${from}.mlp.`)) tensors.set(key.replace(`.${from}.`, `.${layer}.`), tensor);
    }
  }
}

/** As many key/value heads as heads. */
function ungrouped(tensors: Tensors): void {
  for (const [name] of [...tensors]) {
    if (/\.(k_proj|v_proj|k_norm)\./.test(name)) {
      tensors.set(name, tensors.get(name.replace(/[kv]_(proj|norm)/, 'q_$1'))!);
    }
  }
}

function biased(tensors: Tensors): void {
  for (const [name, { shape, data }] of [...tensors]) {
    const [, module] = /^(.*self_attn\.[qkvo]_proj)\.weight$/.exec(name) ?? [];
    if (module)
      tensors.set(`${module}.bias`, { dtype: 'BF16', shape: [shape[0]!], data: data.slice(0, 2 * shape[0]!) });
  }
}

const sparse = { decoder_sparse_step: 1, mlp_only_layers: [] };
const multiHead = { num_key_value_heads: 4, norm_topk_prob: false, clip_qkv: null };
const cases: [name: string, variant: string, edit?: Edit][] = [
  ['deepseek', ''],
  ['deepseek_v2', ''],
  ['deepseek_v2-group', 'without groups and biases', { config: set({ attention_bias: false, topk_method: 'greedy' }, { mscale: 0.8 }), tensors: (all) => without(all, /\.bias$/) }],
  ['deepseek_v3', 'one mscale', { config: set({}, { mscale: 0.8 }) }],
  ['deepseek_v3', 'mscale 1', { config: set({}, { mscale_all_dim: 1 }) }],
  ['glm4_moe', ''],
  ['glm4_moe', 'without norms of q and k', { config: set({ use_qk_norm: false }), tensors: (all) => without(all, /[qk]_norm/) }],
  ['llama', ''],
  ['llama', 'biases', { config: set({ attention_bias: true }), tensors: biased }],
  ['llama-linear', ''],
  ['llama-llama3', ''],
  ['llama-tied-bias', 'silu', { config: set({ hidden_act: 'silu' }) }],
  ['llama-yarn', ''],
  ['llama-yarn', 'attention factor', { config: set({}, { attention_factor: 1.3 }) }],
  ['llama-yarn', 'mscale', { config: set({}, { mscale: 0.8, mscale_all_dim: 0.5 }) }],
  ['mistral', 'without a window', { config: set({ sliding_window: null }) }],
  ['mixtral', ''],
  ['olmoe', 'all heads', { config: set(multiHead), tensors: ungrouped }],
  ['qwen2', 'without windows', { config: set({ use_sliding_window: false }) }],
  ['qwen2_moe', 'all layers sparse', { config: set(sparse), tensors: allSparse }],
  ['qwen3', ''],
  ['qwen3_moe', 'all layers sparse', { config: set(sparse), tensors: allSparse }],
]; // prettier-ignore

test.each(cases)('%s %s: log-probabilities in llama.cpp are ours', async (name, variant, edit) => {
  const path = archCase(name, edit);
  giveTokenizer(path);
  const out = join(work, `${name} ${variant}.gguf`);
  await convert({ input: path, format: 'gguf', dtype: 'f32' }, out, env);
  const open = await openModel(path);
  const { vocab } = open.model;
  await open.close();
  const tokens = someTokens(24, vocab);
  const want = await ourLogits(path, env, tokens);
  const { rows } = await llamaScore(out, tokens, tokens.length, 1);
  expect(rows).toHaveLength(tokens.length - 1);
  let worst = 0;
  for (const [i, row] of rows.entries()) {
    const own = want.subarray(i * vocab, (i + 1) * vocab);
    const total = Math.log(own.reduce((sum, logit) => sum + Math.exp(logit), 0));
    for (const [v, value] of row.entries()) worst = Math.max(worst, Math.abs(value - (own[v]! - total)));
  }
  expect(worst).toBeLessThan(1e-4);
  // Our reader sees the same model in the file.
  const back = await ourLogits(out, env, tokens);
  expect(Math.max(...back.map((logit, i) => Math.abs(logit - want[i]!)))).toBeLessThan(1e-5);
});

/** What llama.cpp cannot run is refused before anything is written, not written to be answered differently. */
const refused: [name: string, reason: RegExp, edit?: Edit][] = [
  ['deepseek-norm', /fixed for the architecture/],
  ['deepseek_v2-group', /their two best/, { config: set({ attention_bias: false }, { mscale: 0.8 }), tensors: (all) => without(all, /\.bias$/) }], // prettier-ignore
  ['deepseek_v3', /mscale_all_dim/],
  ['deepseek_v3-plain', /interleaved/],
  ['deepseek_v32', /not written as GGUF/],
  ['deepseek_v4', /not written as GGUF/],
  ['llama-caps', /soft caps/],
  ['llama-dynamic', /rope scaling/],
  ['llama-longrope', /rope scaling/],
  ['llama-tied-bias', /activation.*gelu/],
  ['mistral', /sliding window/],
  ['mixtral', /window/, { config: set({ sliding_window: 8 }) }],
  ['olmoe', /key\/value heads/, { config: set({ norm_topk_prob: false }) }],
  ['olmoe', /clip/, { config: set({ ...multiHead, clip_qkv: 2 }), tensors: ungrouped }],
  ['qwen2', /window/],
  ['qwen2_moe', /mlp\.gate/],
  ['qwen3', /no place for a bias/, { config: set({ attention_bias: true }), tensors: biased }],
  ['qwen3_moe', /mlp\.gate/],
];

test.each(refused)('%s is refused: %s', async (name, reason, edit) => {
  const out = join(work, 'refused.gguf');
  await expect(convert({ input: archCase(name, edit), format: 'gguf', dtype: 'f32' }, out, env)).rejects.toThrow(
    reason,
  );
});

test('every architecture fixture is in one of the two lists', () => {
  const all = readdirSync(fixture('arch'), { withFileTypes: true }).filter((entry) => entry.isDirectory());
  const known = new Set([...cases, ...refused].map(([name]) => name));
  expect(all.map(({ name }) => name).filter((name) => !known.has(name) && !/_vl|ocr/.test(name))).toEqual([]);
});

/** As many one-letter tokens as the vocabulary has rows: node-llama-cpp loads no model without a tokenizer. */
function giveTokenizer(folder: string): void {
  const { vocab_size: size } = JSON.parse(readFileSync(join(folder, 'config.json'), 'utf8')) as { vocab_size: number };
  const letters = Array.from({ length: size - 1 }, (_, i) => String.fromCharCode(33 + i));
  const vocab = Object.fromEntries([...letters, '!"'].map((token, i) => [token, i]));
  const tokenizer = {
    ...{ version: '1.0', added_tokens: [], normalizer: null, post_processor: null, decoder: { type: 'ByteLevel' } },
    pre_tokenizer: { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true },
    model: { type: 'BPE', vocab, merges: ['! "'] },
  };
  writeFileSync(join(folder, 'tokenizer.json'), JSON.stringify(tokenizer));
}
