import { badInput } from '../base/errors.js';
import { fusedName, fusedParts } from '../checkpoint/fused-names.js';
import type { AssembledPart, Checkpoint, TensorEntry } from '../checkpoint/types.js';
import { asStored, assembled } from '../formats/assembly.js';
import { encodedBytes } from '../formats/ggml.js';
import { requirePlain, type Fuse, type Fusion, type Reshaped } from './fusion.js';

type Config = Checkpoint['config'];

const kindOf = (fused: string): Fuse => (fused.endsWith('qkv_proj') ? 'qkv' : 'gate-up');
const bytesOf = ({ shape, encoding }: TensorEntry): number => encodedBytes(shape, encoding);

/** Llama with or without a sliding window, as Phi-3's container describes it. Errors: what it has no key for. */
function phi3Config(config: Config, where: string): Config {
  const refuse = (key: string, got: unknown, expected: string): Error =>
    badInput('Phi-3’s container, which holds fused matrices, has no place for this model', {
      where: `${where}, ${key}`,
      got: JSON.stringify(got),
      expected,
      hint: 'ONNX graphs can hold fused matrices of every architecture: --format onnx.',
    });
  const type = config.model_type;
  if (type !== 'llama' && type !== 'mistral') throw refuse('model_type', type, '"llama" or "mistral"');
  for (const key of ['attention_bias', 'mlp_bias']) if (config[key] === true) throw refuse(key, true, 'no biases');
  if ((config.hidden_act ?? 'silu') !== 'silu') throw refuse('hidden_act', config.hidden_act, '"silu"');
  const rope = (config.rope_scaling ?? config.rope_parameters) as { rope_type?: unknown; type?: unknown } | undefined;
  const scaling = rope?.rope_type ?? rope?.type ?? 'default';
  if (scaling !== 'default') throw refuse('rope_parameters.rope_type', scaling, '"default"');
  const { attention_bias: _a, mlp_bias: _m, pretraining_tp: _p, ...rest } = config;
  return {
    ...rest,
    architectures: ['Phi3ForCausalLM'],
    model_type: 'phi3',
    original_max_position_embeddings: config.max_position_embeddings,
    // Phi-3's defaults are ids of its own vocabulary.
    ...{ bos_token_id: config.bos_token_id ?? null, eos_token_id: config.eos_token_id ?? null, pad_token_id: config.pad_token_id ?? null }, // prettier-ignore
    sliding_window: type === 'mistral' ? (config.sliding_window ?? null) : null,
  };
}

/** The same backwards. Errors: no Phi-3, channels that are not turned, frequencies that change with the length. */
function llamaConfig(config: Config, where: string): Config {
  if (config.model_type !== 'phi3') {
    throw badInput('There are no fused matrices to split', {
      where: `${where}, model_type`,
      got: JSON.stringify(config.model_type),
      expected: '"phi3"',
      hint: 'Fused matrices of ONNX graphs are read apart without --fuse split.',
    });
  }
  const { original_max_position_embeddings: _o, resid_pdrop: _r, embd_pdrop: _e, ...rest } = config;
  const rope = (config.rope_scaling ?? config.rope_parameters) as Record<string, unknown> | null | undefined;
  const turned = rope?.partial_rotary_factor ?? config.partial_rotary_factor ?? 1;
  const scaling = rope?.rope_type ?? rope?.type ?? 'default';
  if (turned !== 1 || scaling !== 'default') {
    throw badInput('Phi-3 with these rotary embeddings is no Llama', {
      where: `${where}, rope_parameters`,
      got: turned === 1 ? JSON.stringify(scaling) : `partial_rotary_factor ${JSON.stringify(turned)}`,
      expected: 'the default type, all channels turned',
    });
  }
  const windowed = typeof config.sliding_window === 'number';
  return {
    ...rest,
    architectures: [windowed ? 'MistralForCausalLM' : 'LlamaForCausalLM'],
    model_type: windowed ? 'mistral' : 'llama',
    ...(windowed ? {} : { attention_bias: false, mlp_bias: false }),
  };
}

/** q, k, v and gate, up of each layer as one matrix each, in Phi-3's container: vLLM and transformers load it. */
export function fuseToPhi3(checkpoint: Checkpoint): Reshaped {
  requirePlain(checkpoint, 'fused');
  const config = phi3Config(checkpoint.config, checkpoint.configPath ?? checkpoint.path);
  const tensors = new Map<string, TensorEntry>();
  const fusions: Fusion[] = [];
  for (const [name, entry] of checkpoint.tensors) {
    const module = name.replace(/\.weight$/, '');
    const leaves = /\.q_proj$/.test(module) ? ['q_proj', 'k_proj', 'v_proj'] : /\.gate_proj$/.test(module) ? ['gate_proj', 'up_proj'] : undefined; // prettier-ignore
    if (leaves === undefined) {
      if (!/\.(k_proj|v_proj|up_proj)\.weight$/.test(name)) tensors.set(name, entry);
      continue;
    }
    const from = leaves.map((leaf) => module.replace(/[^.]+$/, leaf));
    const parts = from.map((part) => {
      const own = checkpoint.tensors.get(`${part}.weight`);
      if (own) return own;
      throw badInput('A linear that is to be fused is not there', {
        where: checkpoint.path,
        expected: `${part}.weight`,
      });
    });
    const into = fusedName(from);
    const rows = parts.reduce((sum, { shape }) => sum + shape[0]!, 0);
    tensors.set(`${into}.weight`, assembled(`${into}.weight`, [rows, entry.shape[1]!], 0, parts.map(asStored)));
    const bytes = parts.reduce((sum, part) => sum + bytesOf(part), 0);
    const linears = parts.map((weight) => [{ weight }]);
    fusions.push({ kind: kindOf(into), from, into: [into], parts: linears, bytes: { before: bytes, after: bytes } });
  }
  return { checkpoint: { ...checkpoint, config, tensors }, fusions, notes: [] };
}

/** Phi-3's fused matrices as the linears of Llama, or of Mistral where it has a window. */
export function splitPhi3(checkpoint: Checkpoint): Reshaped {
  const config = llamaConfig(checkpoint.config, checkpoint.configPath ?? checkpoint.path);
  requirePlain(checkpoint, 'split');
  const tensors = new Map<string, TensorEntry>();
  const fusions: Fusion[] = [];
  for (const [name, entry] of checkpoint.tensors) {
    const module = name.replace(/\.weight$/, '');
    const parts = fusedParts(module);
    if (parts === undefined || entry.shape.length !== 2) {
      tensors.set(name, entry);
      continue;
    }
    const sizes = sizesOf(parts, entry, config);
    let from = 0;
    for (const [i, part] of parts.entries()) {
      const cut: AssembledPart = { ...asStored(entry), cut: { axis: 0, from, to: from + sizes[i]! } };
      from += sizes[i]!;
      tensors.set(`${part}.weight`, assembled(`${part}.weight`, [sizes[i]!, entry.shape[1]!], 0, [cut]));
    }
    fusions.push({ kind: 'split', from: [module], into: parts, parts: [[{ weight: entry }]], bytes: { before: bytesOf(entry), after: bytesOf(entry) } }); // prettier-ignore
  }
  return { checkpoint: { ...checkpoint, config, tensors }, fusions, notes: [] };
}

function sizesOf(parts: readonly string[], { name, shape, span }: TensorEntry, config: Config): number[] {
  const rows = shape[0]!;
  const heads = Number(config.num_attention_heads);
  const head = Number(config.head_dim ?? Number(config.hidden_size) / heads);
  const kv = Number(config.num_key_value_heads ?? heads) * head;
  const sizes = parts.length === 3 ? [heads * head, kv, kv] : parts.map(() => rows / parts.length);
  if (sizes.every(Number.isSafeInteger) && sizes.reduce((a, b) => a + b, 0) === rows) return sizes;
  throw badInput('A fused matrix does not fit the config', { where: `${span.path}, tensor ${name}`, expected: `${sizes.join(' + ')} rows`, got: `${rows}` }); // prettier-ignore
}
