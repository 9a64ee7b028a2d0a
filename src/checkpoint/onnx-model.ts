import { badInput } from '../base/errors.js';
import type { OnnxNode } from '../formats/onnx.js';
import type { TensorEntry } from '../formats/types.js';

type Config = Readonly<Record<string, unknown>>;

/** What the layout `matmulnbits` needs of each quantized linear beyond its tensors. */
export interface NBitsLinear {
  readonly bits: number;
  readonly blockSize: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
}

/** Inputs of com.microsoft.MatMulNBits. */
const nBitsInputs = { codes: 1, scales: 2, zeroPoints: 3, groupIndex: 4, bias: 5 };

/** Tables of cosines and sines follow from the config. */
const rotaryTables = /^(cos|sin)_cache(_\w+)?$/;

/**
 * An ONNX graph's initializers under the names that architectures use. The matrix of a MatMul is [K, N] and becomes the
 * view [N, K]; MatMulNBits becomes `X.weight_nbits` with its scales, described in `quantization_config`. Names come from
 * the initializer where it has a real one, else from the node (`/model/layers.0/mlp/up_proj/MatMul`).
 */
export function fromOnnx(
  tensors: ReadonlyMap<string, TensorEntry>,
  nodes: readonly OnnxNode[],
  config: Config,
): { tensors: Map<string, TensorEntry>; config: Config } {
  const out = new Map<string, TensorEntry>();
  const linears = Object.create(null) as Record<string, NBitsLinear>;
  const used = new Set<string>();
  const add = (name: string, entry: TensorEntry): void => {
    if (out.has(name)) throw badInput('Two tensors of the graph have one name', { where: `${entry.span.path}, ${JSON.stringify(name)}` }); // prettier-ignore
    out.set(name, { ...entry, name });
  };
  for (const node of nodes) {
    const weight = tensors.get(node.inputs[1] ?? '');
    if (weight === undefined || used.has(weight.name)) continue;
    if (node.op === 'MatMulNBits' && node.domain === 'com.microsoft') {
      const name = moduleName(weight.name, node.name);
      linears[`${name}.weight`] = addNBits(node, tensors, name, add);
      for (const input of node.inputs) used.add(input);
    } else if (isTransposed(node) && weight.shape.length === 2) {
      used.add(weight.name);
      const [k, n] = weight.shape as [number, number];
      const entry = { ...weight, shape: [n, k], strides: [1, n] };
      for (const [name, part] of splitFused(`${moduleName(weight.name, node.name)}.weight`, entry, config))
        add(name, part);
    }
  }
  for (const [name, entry] of tensors) if (!used.has(name) && !rotaryTables.test(name)) add(plainName(name), entry);
  const quantization_config = { quant_method: 'matmulnbits', linears };
  return { tensors: out, config: Object.keys(linears).length > 0 ? { ...config, quantization_config } : config };
}

const isTransposed = ({ op, domain, integers }: OnnxNode): boolean =>
  (op === 'MatMul' && domain === '') || (op === 'Gemm' && domain === '' && (integers.get('transB') ?? 0) === 0);

/** `model.layers.0.attn.q_proj.MatMul.weight_Q4` or `/model/layers.0/attn/q_proj/MatMul` -> the module's name. */
function moduleName(initializer: string, node: string): string {
  const anonymous = !/^(model|lm_head|transformer)\b/.test(initializer);
  const path = anonymous && node !== '' ? node.replace(/^\//, '').replaceAll('/', '.') : initializer;
  const bare = path
    .replace(/(_Q\d+\w*|_quant(ized)?|\.qweight|\.weight_\w+)$/i, '')
    .replace(/\.weight$/, '')
    .replace(/\.(MatMul|Gemm)(NBits)?(_\d+|_Q\d+)*$/, '');
  return plainName(bare);
}

/** onnxruntime-genai's names of modules -> those of transformers. */
const plainName = (name: string): string =>
  name
    .replace(/\.attn\./, '.self_attn.')
    .replace(/^model\.layers\.\d+\.final_norm_layernorm\./, 'model.norm.')
    .replace(/\.(MatMul|Add|Gemm)\.(weight|bias)$/, '.$2');

/** q, k and v in one matrix [q + k + v, K], as the transposed view that it is: three views. */
function splitFused(name: string, entry: TensorEntry, config: Config): [string, TensorEntry][] {
  const match = /^(.*self_attn)\.qkv_proj\.weight$/.exec(name);
  const heads = Number(config['num_attention_heads']);
  if (match === null || !Number.isSafeInteger(heads)) return [[name, entry]];
  const head = Number(config['head_dim'] ?? Number(config['hidden_size']) / heads);
  const [q, kv] = [heads * head, Number(config['num_key_value_heads'] ?? heads) * head];
  const [rows, columns] = entry.shape as [number, number];
  if (q + 2 * kv !== rows) {
    throw badInput('A fused q/k/v matrix does not fit the config', {
      where: `${entry.span.path}, tensor ${JSON.stringify(name)}`,
      expected: `${q} + ${kv} + ${kv} rows`,
      got: `${rows}`,
    });
  }
  const size = entry.span.bytes / (rows * columns);
  const cut = (from: number, count: number): TensorEntry => {
    // Column-major: rows of the view are columns of the file; a run of them leaves gaps.
    const bytes = ((columns - 1) * rows + count) * size;
    return {
      ...entry,
      shape: [count, columns],
      span: { ...entry.span, offset: entry.span.offset + from * size, bytes },
    };
  };
  const at = match[1]!;
  return [
    [`${at}.q_proj.weight`, cut(0, q)],
    [`${at}.k_proj.weight`, cut(q, kv)],
    [`${at}.v_proj.weight`, cut(q + kv, kv)],
  ];
}

function addNBits(
  node: OnnxNode,
  tensors: ReadonlyMap<string, TensorEntry>,
  name: string,
  add: (name: string, entry: TensorEntry) => void,
): NBitsLinear {
  const need = (attribute: string): number => {
    const value = node.integers.get(attribute);
    if (value !== undefined && value > 0 && value < 2 ** 31) return value;
    throw badInput('MatMulNBits lacks an attribute', { where: `node ${JSON.stringify(node.name)}, ${attribute}`, got: `${value}` }); // prettier-ignore
  };
  const [k, n, blockSize, bits] = [need('K'), need('N'), need('block_size'), node.integers.get('bits') ?? 4];
  const groups = Math.ceil(k / blockSize);
  const part = (input: number): TensorEntry | undefined => tensors.get(node.inputs[input] ?? '');
  const put = (input: number, suffix: string, shape: number[]): void => {
    const entry = part(input);
    if (entry === undefined) return;
    const count = (dims: readonly number[]): number => dims.reduce((a, b) => a * b, 1);
    if (count(entry.shape) !== count(shape)) {
      throw badInput('An input of MatMulNBits has another size than its attributes say', {
        where: `${entry.span.path}, initializer ${JSON.stringify(entry.name)}`,
        expected: `[${shape.join(', ')}]`,
        got: `[${entry.shape.join(', ')}]`,
      });
    }
    add(`${name}.${suffix}`, { ...entry, shape });
  };
  put(nBitsInputs.codes, 'weight_nbits', [n, groups, Math.ceil((blockSize * bits) / 8)]);
  put(nBitsInputs.scales, 'weight_scales', [n, groups]);
  const points = part(nBitsInputs.zeroPoints);
  const packed = points?.encoding.kind === 'plain' && points.encoding.dtype === 'u8';
  put(nBitsInputs.zeroPoints, 'weight_zero_points', [n, packed ? Math.ceil((groups * bits) / 8) : groups]);
  const order = part(nBitsInputs.groupIndex);
  if (order !== undefined && points !== undefined) {
    throw badInput('MatMulNBits with both g_idx and zero points is not read: runtimes disagree on what it means', {
      where: `node ${JSON.stringify(node.name)}`,
    });
  }
  put(nBitsInputs.groupIndex, 'weight_g_idx', [order?.shape[0] === k ? k : groups * blockSize]);
  put(nBitsInputs.bias, 'bias', [n]);
  return { bits, blockSize, inFeatures: k, outFeatures: n };
}
