import type { Random } from '../../src/base/rng.js';
import { op } from '../../src/formats/pickle-ops.js';
import { edge, oddTexts, pick, shuffled, u32, u64 } from './bytes.js';

const lines = new Set<number>([op.INT, op.LONG, op.FLOAT, op.STRING, op.UNICODE, op.PERSID, op.GET, op.PUT]);
const twoLines = new Set<number>([op.GLOBAL, op.INST]);
const fixed = new Map<number, number>([
  [op.PROTO, 1], [op.FRAME, 8], [op.BININT, 4], [op.BININT1, 1], [op.BININT2, 2], [op.BINFLOAT, 8], [op.BINGET, 1],
  [op.LONG_BINGET, 4], [op.BINPUT, 1], [op.LONG_BINPUT, 4], [op.EXT1, 1], [op.EXT2, 2], [op.EXT4, 4],
]); // prettier-ignore
/** Opcodes whose argument begins with its length, and how many bytes that takes. */
const counted = new Map<number, number>([
  [op.LONG1, 1], [op.LONG4, 4], [op.BINSTRING, 4], [op.SHORT_BINSTRING, 1], [op.BINUNICODE, 4],
  [op.SHORT_BINUNICODE, 1], [op.BINUNICODE8, 8], [op.BINBYTES, 4], [op.SHORT_BINBYTES, 1], [op.BINBYTES8, 8],
  [op.BYTEARRAY8, 8],
]); // prettier-ignore
const bare = Object.values(op).filter((code) => !lines.has(code) && !twoLines.has(code) && !fixed.has(code) && !counted.has(code)); // prettier-ignore

const globals = [
  'torch._utils _rebuild_tensor_v2', 'torch._utils _rebuild_tensor_v3', 'torch._utils _rebuild_parameter',
  'torch._tensor _rebuild_from_type_v2', 'collections OrderedDict', 'torch Size', 'torch FloatStorage',
  'torch BFloat16Storage', 'torch.storage UntypedStorage', 'torch float8_e4m3fn', 'torch bfloat16', 'builtins set',
  'numpy dtype', 'os system', 'builtins eval', 'torch._utils _rebuild_qtensor', '_codecs encode',
]; // prettier-ignore

/** The opcodes of one pickle from `start` to its STOP, each with its argument. */
export function opcodes(bytes: Buffer, start = 0): Buffer[] {
  const out: Buffer[] = [];
  for (let at = start; at < bytes.length;) {
    const code = bytes[at]!;
    let end = at + 1;
    const newline = (from: number): number => {
      const found = bytes.indexOf(0x0a, from);
      return found < 0 ? bytes.length : found + 1;
    };
    if (lines.has(code)) end = newline(end);
    else if (twoLines.has(code)) end = newline(newline(end));
    else if (fixed.has(code)) end += fixed.get(code)!;
    else if (counted.has(code)) {
      const width = counted.get(code)!;
      const length = end + width > bytes.length ? 0 : width === 8 ? Number(bytes.readBigUInt64LE(end)) : bytes.readUIntLE(end, width); // prettier-ignore
      end += width + length;
    }
    out.push(bytes.subarray(at, Math.min(end, bytes.length)));
    at = end;
    if (code === op.STOP) break;
  }
  return out;
}

/** Leaves out, doubles, moves or replaces an opcode, or changes an argument. */
export function reshapePickle(random: Random, bytes: Buffer): Buffer {
  const ops = opcodes(bytes);
  if (ops.length === 0) return bytes;
  // Bombs: the same opcode again and again, a list of doubled references.
  if (random.below(1500) === 0) {
    const at = random.below(ops.length);
    ops.splice(at, 0, ...Array.from({ length: 20_000 }, () => pick(random, ops.slice(at, at + 3)))); // prettier-ignore
    return Buffer.concat(ops);
  }
  return Buffer.concat(shuffled(random, ops, (one) => otherOp(random, one)));
}

function otherOp(random: Random, one: Buffer): Buffer {
  const code = one[0]!;
  if (random.below(3) === 0) return Buffer.from([pick(random, bare)]);
  if (twoLines.has(code)) {
    const [module, name] = pick(random, globals).split(' ');
    return Buffer.from(`${String.fromCharCode(code)}${module}\n${name}\n`);
  }
  if (lines.has(code)) return Buffer.from(`${String.fromCharCode(code)}${random.below(2) ? edge(random) : pick(random, oddTexts)}\n`); // prettier-ignore
  if (fixed.has(code)) return Buffer.concat([one.subarray(0, 1), u64(random.below(2) ? random.below(9) : edge(random))]).subarray(0, one.length); // prettier-ignore
  if (!counted.has(code)) return Buffer.from([pick(random, bare)]);
  if (code === op.LONG1 || code === op.LONG4) return Buffer.concat([Buffer.from([op.LONG1, 8]), u64(edge(random))]);
  const width = counted.get(code)!;
  if (random.below(4) === 0) return Buffer.concat([one.subarray(0, 1), u64(edge(random)).subarray(0, width), one.subarray(1 + width)]); // prettier-ignore
  const text = Buffer.from(pick(random, oddTexts));
  return Buffer.concat([Buffer.from([op.BINUNICODE]), u32(text.length), text]);
}
