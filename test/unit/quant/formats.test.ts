import { mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { parse } from 'yaml';
import type { StagedOutput } from '../../../src/checkpoint/types.js';
import type { QuantFormat } from '../../../src/quant/formats.js';
import type { QuantizeOptions } from '../../../src/quant/options.js';
import { previewQuantize } from '../../../src/quant/prepare.js';
import { quantize } from '../../../src/quant/run.js';
import { defaultRecipe } from '../../../src/quant/scheme.js';
import { deployment } from '../../../src/targets/deploy/emit.js';
import { mixtureType } from '../../../src/targets/gguf-mixture.js';
import { fixture, testEnv } from '../../arch/support.js';
import { ourLogits } from '../../support/models.js';

const env = testEnv();
const work = mkdtempSync(join(tmpdir(), 'formats-'));
afterAll(() => rmSync(work, { recursive: true }));

const run = (out: string, formats: readonly QuantFormat[], more: Partial<QuantizeOptions> = {}) =>
  quantize(
    {
      ...{ input: fixture('v1.0', 'v1.0_checkpoint.bin'), out: join(work, out), formats },
      recipe: { ...defaultRecipe, method: 'rtn', groupSize: 64, blocks: 'q4_0' },
      tool: { name: 'deepseek-convert', version: '0' },
      commandLine: 'test',
      ...more,
    },
    env,
  );

const tokens = Int32Array.from({ length: 12 }, (_, i) => (i * 97 + 3) % 8000);
const logits = (path: string) => ourLogits(path, env, tokens);

describe('several formats from one calibration', () => {
  test('all hold the same weights, bit by bit', async () => {
    const { verified } = await run('all', ['compressed-tensors', 'gptq', 'awq', 'onnx', 'gguf']);
    expect(verified).toBe(5 * 28);
    const folder = join(work, 'all');
    const want = await logits(join(folder, 'compressed-tensors'));
    for (const format of ['gptq', 'awq', 'onnx']) expect(await logits(join(folder, format)), format).toEqual(want);
    const gguf = await logits(join(folder, 'gguf/model.gguf'));
    // The rows of q and k stand in another order, and are summed in it.
    expect(Math.max(...gguf.map((value, i) => Math.abs(value - want[i]!)))).toBeLessThan(1e-4);
    expect(JSON.parse(readFileSync(join(folder, 'deepseek-convert.json'), 'utf8'))).toMatchObject({ schema: 1 });
    expect(readFileSync(join(folder, 'gptq/README.md'), 'utf8')).toContain('## Measured');
  });

  test('the cards of all say what was measured of one, and whether they hold its weights', async () => {
    const verdict = {
      passed: true,
      tokens: 64,
      kl: { mean: 0.0125 },
      top1: 0.9,
      perplexity: { reference: 10, candidate: 10.5 },
    };
    const judged: string[] = [];
    const accept = (staged: StagedOutput) => {
      judged.push(basename(staged.path));
      return Promise.resolve(verdict);
    };
    const recipe = { ...defaultRecipe, method: 'rtn', groupSize: 64, blocks: 'q8_0' } as const;
    const calibration = { source: 'default', samples: 2, seqLen: 32, seed: 0 } as const;
    await run('cards', ['imatrix', 'gptq', 'onnx', 'gguf'], { accept, recipe, calibration, scope: 'o_proj' });
    expect(judged).toEqual(['gptq']);
    const card = (format: string) => readFileSync(join(work, 'cards', format, 'README.md'), 'utf8');
    for (const format of ['gptq', 'onnx', 'gguf']) {
      expect(card(format), format).toContain(
        'KL divergence 0.01250 nats, same top token 0.9000, perplexity 10.50 (input 10.00)',
      );
      const provenance = readFileSync(join(work, 'cards', format, 'deepseek-convert.json'), 'utf8');
      expect((JSON.parse(provenance) as { validation: object }).validation, format).toMatchObject(verdict);
    }
    expect(card('gptq')).not.toContain('Measured on the');
    expect(card('onnx')).toContain('Measured on the gptq output beside this one, which holds the same weights');
    expect(card('gguf')).toContain('Measured on the gptq output beside this one, which was rounded in another way');
    // No model, so nothing that could be measured.
    expect(card('imatrix')).toMatch(/, importance matrix\n/);
    expect(card('imatrix')).not.toMatch(/alidated|Measured/);
    await run('lone.gguf', ['gguf'], { accept, recipe, calibration, scope: 'o_proj' });
    expect(readFileSync(join(work, 'lone.README.md'), 'utf8')).toContain('KL divergence 0.01250 nats');
  });

  test('what a format cannot hold is refused before the work', async () => {
    await expect(run('twice', ['gptq', 'gptq'])).rejects.toThrow(/twice/);
    await expect(run('file.gguf', ['gptq', 'gguf'])).rejects.toThrow(/folders in one folder/);
    await expect(run('tp', ['gptq'], { tensorParallel: [8] })).rejects.toThrow(/would not divide among 8 GPUs/);
    await expect(run('emit', ['gptq'], { emit: ['llama.cpp'] })).rejects.toThrow(/nothing to serve/);
    await expect(run('none', ['onnx'], { tensorParallel: [2] })).rejects.toThrow(/engines do not split/);
    expect(readdirSync(work).filter((name) => /^(twice|file|tp|none|emit)/.test(name))).toEqual([]);
  });
});

// 256 columns of o_proj, 4 heads, 2 key/value heads.
test.each([
  [64, [1, 2, 4], undefined],
  [64, [1, 2, 4, 8], /among 8 GPUs \(4 attention heads/],
  [128, [1, 2], undefined],
  [128, [1, 2, 4], /among 4 GPUs \(.*o_proj: 256 columns in groups of 128/],
  [-1, [1, 2, 4], undefined],
])(
  'groups of %i divide among %j GPUs, or are refused from headers alone',
  async (groupSize, tensorParallel, refusal) => {
    const plan = previewQuantize({
      ...{ input: fixture('v1.0', 'v1.0_checkpoint.bin'), out: join(work, 'shares'), formats: ['compressed-tensors'] },
      ...{ recipe: { ...defaultRecipe, groupSize }, tensorParallel, commandLine: 'test' },
      tool: { name: 'deepseek-convert', version: '0' },
    });
    await (refusal ? expect(plan).rejects.toThrow(refusal) : expect(plan).resolves.toMatchObject({ notices: [] }));
  },
);

test('deployment files say what engines cannot do', () => {
  const model = { name: "it's", context: 512, tensorParallel: 2 };
  const files = deployment(['vllm', 'triton', 'sglang', 'prometheus'], 'gptq', model);
  expect(files.get('serve-vllm.sh')).toMatch(/warning: vLLM knows no max_wait_ms \(50 ms asked\)/);
  expect(files.get('serve-vllm.sh')).toContain("--served-model-name 'it'\\''s'");
  expect(files.get('serve-vllm.sh')).toContain('--max-num-seqs 32 --tensor-parallel-size 2');
  expect(files.get('serve-sglang.sh')).toContain('--schedule-policy lof');
  const scrape = parse(files.get('prometheus.yml')!) as { scrape_configs: { job_name: string }[] };
  expect(scrape.scrape_configs.map(({ job_name }) => job_name)).toEqual(['vllm', 'sglang', 'triton', 'dcgm']);
  const rules = parse(files.get('prometheus-rules.yml')!) as { groups: { rules: { record: string }[] }[] };
  const records = new Set(rules.groups[0]!.rules.map(({ record }) => record));
  expect([...records].sort()).toEqual([
    'llm:error_rate',
    'llm:gpu_memory_bytes',
    'llm:latency_seconds:p99',
    'llm:qps',
    'llm:tokens_per_second',
  ]);
  expect(deployment(['llama.cpp'], 'gptq', model).size).toBe(0);
  expect(deployment(['llama.cpp', 'prometheus'], 'gguf', model).get('prometheus-rules.yml')).toContain('# warning: llama.cpp exports no request latencies'); // prettier-ignore
  // llama_decode is a step of all slots: it counts no requests.
  expect(deployment(['llama.cpp', 'prometheus'], 'gguf', model).get('prometheus-rules.yml')).not.toMatch(/n_decode|llm:qps/); // prettier-ignore
  expect(files.get('triton-config.pbtxt')).toContain('key: "REPORT_CUSTOM_METRICS" value: { string_value: "true" }');
});

test('mixtures choose types as llama.cpp does for a model of 32 layers', () => {
  const down = (mixture: 'q4_k_s' | 'q4_k_m') =>
    Array.from({ length: 32 }, (_, i) => mixtureType(mixture, 'ffn_down', i, 32, 0));
  const more = (types: string[], type: string) => types.flatMap((one, i) => (one === type ? [i] : []));
  expect(more(down('q4_k_m'), 'q6_k')).toEqual([0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]);
  expect(more(down('q4_k_s'), 'q5_k')).toEqual([0, 1, 2, 3]);
  expect(mixtureType('q4_k_m', 'attn_v', 5, 32, 8)).toBe('q8_0');
  expect(mixtureType('q4_k_m', 'output', 0, 32, 0)).toBe('q6_k');
});
