import { badInput } from '../base/errors.js';
import type { OnnxNode } from '../formats/onnx.js';
import type { TensorEntry } from '../formats/types.js';
import { fusedParts } from './fused-names.js';

type Config = Readonly<Record<string, unknown>>;

/** What the layout `matmulnbits` needs of each quantized linear beyond its tensors. */
export interface NBitsLinear {
  readonly bits: number;
  readonly blockSize: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** Its rows among those of its tensors, where gate and up take turns. */
  readonly rows?: { readonly first: number; readonly step: number };
}

/** Inputs of com.microsoft.MatMulNBits, and of each half of com.microsoft.QMoE. */
const nBitsInputs = { codes: 1, scales: 2, zeroPoints: 3, groupIndex: 4, bias: 5 };
const expertInputs = [
  { codes: 2, scales: 3, zeroPoints: 11 },
  { codes: 5, scales: 6, zeroPoints: 12 },
];

/** Tables of cosines and sines follow from the config. */
const rotaryTables = /^(cos|sin)_cache(_\w+)?$/;

/**
 * An ONNX graph's initializers under the names that architectures use. The matrix of a MatMul is [K, N] and becomes the
 * view [N, K]; MatMulNBits becomes `X.weight_nbits` with its scales, described in `quantization_config`, and so does
 * each expert of a QMoE. Fused matrices are read apart. Names come from the initializer where it has a real one, else
 * from the node (`/model/layers.0/mlp/up_proj/MatMul`); linears of one module that follow each other are X.0, X.1.
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
  const place = chainPlaces(nodes, tensors);
  for (const node of nodes) {
    if (node.op === 'QMoE' && node.domain === 'com.microsoft') {
      addExperts(node, tensors, used, (name, linear) => (linears[`${name}.weight`] = linear), add);
      continue;
    }
    const weight = tensors.get(node.inputs[1] ?? '');
    if (weight === undefined || used.has(weight.name)) continue;
    const name = `${moduleName(weight.name, node.name)}${place(node)}`;
    if (node.op === 'MatMulNBits' && node.domain === 'com.microsoft') {
      addNBits(node, tensors, name, config, (part, linear) => (linears[`${part}.weight`] = linear), add);
      for (const input of node.inputs) used.add(input);
    } else if (isTransposed(node) && weight.shape.length === 2) {
      used.add(weight.name);
      const [k, n] = weight.shape as [number, number];
      // [K, N] is the view [N, K]; rows of the view are columns of the file, and a run of them leaves gaps.
      const size = weight.span.bytes / (n * k);
      const rows = (from: number, count: number): TensorEntry => ({
        ...weight,
        shape: [count, k],
        strides: [1, n],
        span: { ...weight.span, offset: weight.span.offset + from * size, bytes: ((k - 1) * n + count) * size },
      });
      for (const [part, from, count] of partsOf(name, n, config, weight)) add(`${part}.weight`, rows(from, count));
    }
  }
  for (const [name, entry] of tensors) {
    if (used.has(name) || rotaryTables.test(name)) continue;
    for (const [part, own] of biasParts(plainName(name), entry, config)) add(part, own);
  }
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

/** The linears of one matrix of N rows: name, first row, rows. */
function partsOf(
  module: string,
  n: number,
  config: Config,
  { span, name }: TensorEntry,
): [part: string, from: number, rows: number][] {
  const parts = fusedParts(module);
  if (parts === undefined) return [[module, 0, n]];
  let sizes = parts.map(() => n / parts.length);
  if (parts.length === 3) {
    const heads = Number(config['num_attention_heads']);
    if (!Number.isSafeInteger(heads)) return [[module, 0, n]];
    const head = Number(config['head_dim'] ?? Number(config['hidden_size']) / heads);
    const kv = Number(config['num_key_value_heads'] ?? heads) * head;
    sizes = [heads * head, kv, kv];
  }
  if (sizes.some((rows) => !Number.isSafeInteger(rows)) || sizes.reduce((a, b) => a + b, 0) !== n) {
    throw badInput('A fused matrix does not fit the config', {
      where: `${span.path}, tensor ${JSON.stringify(name)}`,
      expected: `${sizes.join(' + ')} rows`,
      got: `${n}`,
    });
  }
  let from = 0;
  return parts.map((part, i) => [part, (from += sizes[i]!) - sizes[i]!, sizes[i]!]);
}

/** A fused bias as those of its linears; any other tensor as it is. */
function biasParts(name: string, entry: TensorEntry, config: Config): [string, TensorEntry][] {
  const module = /^(.*)\.bias$/.exec(name)?.[1];
  if (module === undefined || entry.shape.length !== 1 || fusedParts(module) === undefined) return [[name, entry]];
  const [n] = entry.shape as [number];
  return partsOf(module, n, config, entry).map(([part, from, rows]) => [`${part}.bias`, rowsOf(entry, from, rows)]);
}

/** Some of the rows of a contiguous tensor. */
function rowsOf(entry: TensorEntry, from: number, rows: number): TensorEntry {
  const each = entry.span.bytes / entry.shape[0]!;
  const span = { ...entry.span, offset: entry.span.offset + from * each, bytes: rows * each };
  return { ...entry, shape: [rows, ...entry.shape.slice(1)], span };
}

/** Where a linear's output is the next one's only input (a bias may lie between): `.0`, `.1`, ...; else ''. */
function chainPlaces(
  nodes: readonly OnnxNode[],
  tensors: ReadonlyMap<string, TensorEntry>,
): (node: OnnxNode) => string {
  const users = new Map<string, OnnxNode[]>();
  for (const node of nodes) for (const input of node.inputs) users.set(input, [...(users.get(input) ?? []), node]);
  const isLinear = (node: OnnxNode): boolean =>
    isTransposed(node) && tensors.get(node.inputs[1] ?? '')?.shape.length === 2;
  const next = (node: OnnxNode): OnnxNode | undefined => {
    const [user, ...others] = users.get(node.outputs[0] ?? '') ?? [];
    if (user === undefined || others.length > 0 || node.outputs.length !== 1) return undefined;
    if (user.op === 'Add' && user.domain === '' && user.inputs.some((input) => tensors.has(input))) return next(user);
    return isLinear(user) && user.inputs[0] === node.outputs[0] ? user : undefined;
  };
  const places = new Map<OnnxNode, number>();
  for (const node of nodes) {
    const after = isLinear(node) ? next(node) : undefined;
    if (after === undefined) continue;
    const names = [node, after].map(({ inputs, name }) => moduleName(inputs[1]!, name));
    // Linears of different modules keep their names.
    if (names[0] !== names[1]) continue;
    places.set(node, places.get(node) ?? 0);
    places.set(after, places.get(node)! + 1);
  }
  return (node) => (places.has(node) ? `.${places.get(node)}` : '');
}

type Describe = (module: string, linear: NBitsLinear) => void;

function addNBits(
  node: OnnxNode,
  tensors: ReadonlyMap<string, TensorEntry>,
  name: string,
  config: Config,
  describe: Describe,
  add: (name: string, entry: TensorEntry) => void,
): void {
  const [k, n, blockSize] = [attributeOf(node, 'K'), attributeOf(node, 'N'), attributeOf(node, 'block_size')];
  const bits = node.integers.get('bits') ?? 4;
  const groups = Math.ceil(k / blockSize);
  const part = (input: number): TensorEntry | undefined => tensors.get(node.inputs[input] ?? '');
  const points = part(nBitsInputs.zeroPoints);
  const packed = points?.encoding.kind === 'plain' && points.encoding.dtype === 'u8';
  const order = part(nBitsInputs.groupIndex);
  if (order !== undefined && points !== undefined) {
    throw badInput('MatMulNBits with both g_idx and zero points is not read: runtimes disagree on what it means', {
      where: `node ${JSON.stringify(node.name)}`,
    });
  }
  const stored: [suffix: string, entry: TensorEntry | undefined][] = [
    ['weight_nbits', sized(part(nBitsInputs.codes), [n, groups, Math.ceil((blockSize * bits) / 8)])],
    ['weight_scales', sized(part(nBitsInputs.scales), [n, groups])],
    ['weight_zero_points', sized(points, [n, packed ? Math.ceil((groups * bits) / 8) : groups])],
    ['bias', sized(part(nBitsInputs.bias), [n])],
  ];
  const groupIndex = sized(order, [order?.shape[0] === k ? k : groups * blockSize]);
  for (const [module, from, rows] of partsOf(name, n, config, part(nBitsInputs.codes)!)) {
    for (const [suffix, entry] of stored) if (entry) add(`${module}.${suffix}`, rowsOf(entry, from, rows));
    if (groupIndex) add(`${module}.weight_g_idx`, groupIndex);
    describe(module, { bits, blockSize, inFeatures: k, outFeatures: rows });
  }
}

/** The experts of a QMoE, each with tensors of its own: a part of the stacks. */
function addExperts(
  node: OnnxNode,
  tensors: ReadonlyMap<string, TensorEntry>,
  used: Set<string>,
  describe: Describe,
  add: (name: string, entry: TensorEntry) => void,
): void {
  const part = (input: number): TensorEntry | undefined => tensors.get(node.inputs[input] ?? '');
  const bits = node.integers.get('expert_weight_bits') ?? 4;
  for (const { codes, scales, zeroPoints } of expertInputs) {
    const weight = part(codes);
    const module = /^(.*)\.weight_nbits$/.exec(weight?.name ?? '')?.[1];
    const fused = codes === expertInputs[0]!.codes;
    const leaves = fused ? fusedParts(module ?? '') : module === undefined ? undefined : [module];
    const inTurns = !fused || (node.integers.get('swiglu_fusion') === 1 && leaves?.length === 2);
    // Other writers' names and arrangements stay the tensors that they are.
    if (weight?.shape.length !== 3 || leaves === undefined || !inTurns) return;
    const [experts, n, bytes] = weight.shape as [number, number, number];
    const blockSize = attributeOf(node, 'block_size');
    const k = (bytes * 8) / bits;
    const groups = Math.ceil(k / blockSize);
    const stored: [suffix: string, entry: TensorEntry | undefined][] = [
      ['weight_nbits', weight],
      ['weight_scales', sized(part(scales), [experts, n, groups])],
      ['weight_zero_points', sized(part(zeroPoints), [experts, n, Math.ceil((groups * bits) / 8)])],
    ];
    for (let e = 0; e < experts; e++) {
      for (const [first, leaf] of leaves.entries()) {
        const own = leaf.replace(/\.([^.]+)$/, `.${e}.$1`);
        for (const [suffix, entry] of stored) {
          if (!entry) continue;
          const { shape, ...rest } = rowsOf(entry, e, 1);
          add(`${own}.${suffix}`, { ...rest, shape: shape.slice(1) });
          used.add(entry.name);
        }
        const rows = leaves.length > 1 ? { rows: { first, step: leaves.length } } : {};
        describe(own, { bits, blockSize, inFeatures: k, outFeatures: n / leaves.length, ...rows });
      }
    }
  }
}

function attributeOf({ op, name, integers }: OnnxNode, attribute: string): number {
  const value = integers.get(attribute);
  if (value !== undefined && value > 0 && value < 2 ** 31) return value;
  throw badInput(`${op} lacks an attribute`, { where: `node ${JSON.stringify(name)}, ${attribute}`, got: `${value}` });
}

/** A tensor under the shape that the node's attributes ask for. */
function sized(entry: TensorEntry | undefined, shape: number[]): TensorEntry | undefined {
  if (entry === undefined) return undefined;
  const count = (dims: readonly number[]): number => dims.reduce((a, b) => a * b, 1);
  if (count(entry.shape) === count(shape)) return { ...entry, shape };
  throw badInput('An input of a quantized operator has another size than its attributes say', {
    where: `${entry.span.path}, initializer ${JSON.stringify(entry.name)}`,
    expected: `[${shape.join(', ')}]`,
    got: `[${entry.shape.join(', ')}]`,
  });
}
