import type { DType } from '../base/dtype.js';
import { badInput } from '../base/errors.js';
import { PyGlobal, PyObject, PyTuple } from './pickle-values.js';
import type { PyValue } from './pickle-values.js';
import type { Encoding } from './types.js';

/** Raw data that tensors view. `element` is undefined for untyped storage, whose `count` is in bytes. */
export class TorchStorage extends PyObject {
  constructor(
    readonly key: string,
    /** Class name, for errors and the element type. */
    readonly className: string,
    readonly count: number,
    /** First element, where a legacy file stores a view of a storage. */
    readonly offset = 0,
  ) {
    super(new PyGlobal('torch', className), []);
  }
}

/** A tensor as a pickle describes it: offset and strides in elements of `element`. Nothing is checked yet. */
export class TorchTensor extends PyObject {
  constructor(
    readonly storage: TorchStorage,
    readonly offset: number,
    readonly shape: readonly number[],
    readonly strides: readonly number[],
    /** What rebuilding with an explicit dtype gives; otherwise the storage class decides. */
    readonly dtypeName?: string,
  ) {
    super(new PyGlobal('torch', 'Tensor'), []);
  }
}

const element = (dtype: DType): Encoding => ({ kind: 'plain', dtype });

/** Storage class without "Storage" and dtype name -> element. */
const elements: readonly (readonly [storage: string, dtype: string, encoding: Encoding])[] = [
  ['Float', 'float32', element('f32')],
  ['Double', 'float64', element('f64')],
  ['Half', 'float16', element('f16')],
  ['BFloat16', 'bfloat16', element('bf16')],
  ['Byte', 'uint8', element('u8')],
  ['Char', 'int8', element('i8')],
  ['Short', 'int16', element('i16')],
  ['Int', 'int32', element('i32')],
  ['Long', 'int64', element('i64')],
  ['Bool', 'bool', element('bool')],
  ['ComplexFloat', 'complex64', { kind: 'opaque', name: 'C64', bits: 64 }],
  ['ComplexDouble', 'complex128', { kind: 'opaque', name: 'C128', bits: 128 }],
  ['', 'uint16', element('u16')],
  ['', 'uint32', element('u32')],
  ['', 'uint64', element('u64')],
  ['', 'float8_e4m3fn', element('f8_e4m3')],
  ['', 'float8_e5m2', element('f8_e5m2')],
  ['', 'float8_e8m0fnu', { kind: 'opaque', name: 'F8_E8M0', bits: 8 }],
  ['', 'float8_e4m3fnuz', { kind: 'opaque', name: 'F8_E4M3FNUZ', bits: 8 }],
  ['', 'float8_e5m2fnuz', { kind: 'opaque', name: 'F8_E5M2FNUZ', bits: 8 }],
];
const byStorage = new Map(elements.filter(([storage]) => storage !== '').map(([s, , e]) => [`${s}Storage`, e]));
const byDtype = new Map(elements.map(([, dtype, encoding]) => [dtype, encoding]));

export const storageElement = (className: string): Encoding | undefined => byStorage.get(className);
export const dtypeElement = (dtypeName: string): Encoding | undefined => byDtype.get(dtypeName);

/** How our writer names an element: a storage class, or a dtype for elements that have none. */
export function torchElementName(encoding: Encoding): { storage: string } | { dtype: string } | undefined {
  const same = (other: Encoding): boolean =>
    other.kind === 'plain'
      ? encoding.kind === 'plain' && other.dtype === encoding.dtype
      : other.kind === 'opaque' && encoding.kind === 'opaque' && other.name === encoding.name;
  const found = elements.find(([, , other]) => same(other));
  if (found === undefined) return undefined;
  return found[0] === '' ? { dtype: found[1] } : { storage: `${found[0]}Storage` };
}

const constructors = new Map<string, (args: readonly PyValue[], callee: PyGlobal) => PyValue>([
  ['torch._utils _rebuild_tensor', rebuildTensor],
  ['torch._utils _rebuild_tensor_v2', rebuildTensor],
  ['torch._utils _rebuild_tensor_v3', rebuildTensorV3],
  ['torch._utils _rebuild_parameter', firstArgument],
  ['torch._utils _rebuild_parameter_with_state', firstArgument],
  ['torch.nn.parameter Parameter', firstArgument],
  ['torch.nn.parameter Buffer', firstArgument],
  ['torch._tensor _rebuild_from_type_v2', rebuildFromType],
  ['collections OrderedDict', dictionary],
  ['collections Counter', dictionary],
  ['collections defaultdict', (args) => dictionary(args.slice(1))],
  ['torch Size', (args) => args[0] ?? new PyTuple([])],
  ['torch.torch_version TorchVersion', firstArgument],
]);

/** Recorded as inert objects: harmless, and never a weight. */
const inert = new Set([
  'torch device',
  'torch Tensor',
  'torch.serialization _get_layout',
  'torch._utils _rebuild_sparse_tensor',
  'torch._utils _rebuild_meta_tensor_no_storage',
  'torch._utils _rebuild_qtensor',
  'torch._utils _rebuild_nested_tensor',
  'torch._utils _rebuild_wrapper_subclass',
  '_codecs encode', // bytes, as protocols below 3 write them
  'builtins bytearray',
  'builtins set',
  'builtins frozenset',
  'builtins complex',
  'builtins int',
  'builtins float',
  'builtins dict',
  'builtins list',
  'numpy dtype',
  'numpy ndarray',
  'numpy.core.multiarray scalar',
  'numpy.core.multiarray _reconstruct',
  'numpy._core.multiarray scalar',
  'numpy._core.multiarray _reconstruct',
]);
const torchNames =
  /^(?:per_(?:tensor|channel)_\w+|strided|sparse_\w+|jagged|contiguous_format|preserve_format|channels_last(?:_3d)?)$/;
const storageClass = /^(?:\w{1,20}Storage)$/;
const storageModules = new Set(['torch', 'torch.cuda', 'torch.storage', 'torch.sparse']);

/** The allow-list of PyTorch checkpoints: what torch.load(weights_only=True) takes, and NumPy scalars of training logs. */
export function torchAllows({ module, name }: PyGlobal): boolean {
  const key = `${module} ${name}`;
  if (constructors.has(key) || inert.has(key)) return true;
  if (module === 'torch' && (byDtype.has(name) || /^(?:q?u?int\d{1,3}(?:x\d)?|float\d\w*|complex32|torch_dtype)$/.test(name))) return true; // prettier-ignore
  if (module === 'torch' && torchNames.test(name)) return true;
  return storageModules.has(module) && storageClass.test(name);
}

export function torchConstruct(callee: PyGlobal, args: readonly PyValue[]): PyValue {
  const make = constructors.get(`${callee.module} ${callee.name}`);
  return make === undefined ? new PyObject(callee, args) : make(args, callee);
}

/** `('storage', Class, key, location, count[, view])` -> the storage. Legacy `view` is (key, offset, size) or None. */
export function torchPersistent(id: PyValue, path: string): TorchStorage {
  const fail = (got: string): never => {
    throw badInput('Bad pickle: unknown kind of stored object', { where: path, expected: "('storage', ...)", got });
  };
  if (!(id instanceof PyTuple)) return fail(describe(id));
  const [kind, type, key, , count, view] = id.items;
  if (asText(kind) !== 'storage') return fail(describe(kind ?? null));
  const keyText = asText(key);
  if (!(type instanceof PyGlobal) || keyText === undefined) return fail('a storage without class or key');
  const offset = view instanceof PyTuple ? integer(view.items[1], 'view offset') : 0;
  const viewCount = view instanceof PyTuple ? integer(view.items[2], 'view size') : undefined;
  return new TorchStorage(keyText, type.name, viewCount ?? integer(count, 'storage size'), offset);
}

const asText = (value: PyValue | undefined): string | undefined =>
  typeof value === 'string' ? value : value instanceof Uint8Array ? Buffer.from(value).toString('latin1') : undefined;

export function describe(value: PyValue): string {
  if (value === null) return 'None';
  if (value instanceof PyObject) return `a ${value.callee.toString()}`;
  if (value instanceof PyGlobal) return value.toString();
  if (value instanceof Map) return 'a dictionary';
  if (Array.isArray(value)) return 'a list';
  if (value instanceof PyTuple) return 'a tuple';
  if (value instanceof Set) return 'a set';
  if (value instanceof Uint8Array) return 'bytes';
  return typeof value === 'string' ? JSON.stringify(value.slice(0, 60)) : String(value);
}

function integer(value: PyValue | undefined, what: string): number {
  if (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0) return value;
  const got = value === undefined ? 'none' : describe(value);
  throw badInput(`Bad ${what} of a tensor in a pickle`, { expected: 'a non-negative integer', got });
}

function integers(value: PyValue | undefined, what: string): number[] {
  const items = value instanceof PyTuple ? value.items : Array.isArray(value) ? value : undefined;
  if (items === undefined || items.length > 16) {
    const got = items === undefined ? describe(value ?? null) : `${items.length} dimensions`;
    throw badInput(`Bad ${what} of a tensor in a pickle`, { expected: 'a tuple of integers', got });
  }
  return items.map((item) => integer(item, what));
}

function rebuildTensor(args: readonly PyValue[]): PyValue {
  const [storage, offset, shape, strides] = args;
  if (!(storage instanceof TorchStorage)) {
    throw badInput('A tensor in a pickle has no storage', { got: describe(storage ?? null) });
  }
  return new TorchTensor(storage, integer(offset, 'offset'), integers(shape, 'shape'), integers(strides, 'stride'));
}

function rebuildTensorV3(args: readonly PyValue[]): PyValue {
  const { storage, offset, shape, strides } = rebuildTensor(args) as TorchTensor;
  const dtype = args[6];
  if (!(dtype instanceof PyGlobal))
    throw badInput('A tensor in a pickle has no dtype', { got: describe(dtype ?? null) });
  return new TorchTensor(storage, offset, shape, strides, dtype.name);
}

/** A tensor with Python attributes: (function, type, args, state). The attributes mean nothing here. */
function rebuildFromType(args: readonly PyValue[], callee: PyGlobal): PyValue {
  const [inner, , innerArgs] = args;
  const simple = inner instanceof PyGlobal && /^_rebuild_(?:tensor|tensor_v2|tensor_v3|parameter)$/.test(inner.name);
  if (!simple || inner.module !== 'torch._utils' || !(innerArgs instanceof PyTuple)) return new PyObject(callee, args);
  return torchConstruct(inner, innerArgs.items);
}

function firstArgument(args: readonly PyValue[], callee: PyGlobal): PyValue {
  return args[0] ?? new PyObject(callee, args);
}

/** Made of the same list once only: a small pickle cannot ask for a large dictionary a million times. */
const dictionaries = new WeakMap<PyValue[], PyValue>();

function dictionary(args: readonly PyValue[]): PyValue {
  const [from] = args;
  if (from instanceof Map) return from;
  if (!Array.isArray(from)) return new Map();
  const known = dictionaries.get(from);
  if (known !== undefined) return known;
  const dict = new Map<PyValue, PyValue>();
  for (const pair of from) {
    const [key, value] = pair instanceof PyTuple ? pair.items : Array.isArray(pair) ? pair : [];
    if (key === undefined || value === undefined)
      throw badInput('Bad pickle: a dictionary of something else than pairs');
    dict.set(key, value);
  }
  dictionaries.set(from, dict);
  return dict;
}
