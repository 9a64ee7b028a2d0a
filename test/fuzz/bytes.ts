import type { Random } from '../../src/base/rng.js';

/** Numbers at which something changes: signs, widths, limits of doubles. */
export const edges: readonly bigint[] = [
  0n, 1n, 2n, 3n, 7n, 8n, 16n, 31n, 32n, 63n, 64n, 65n, 127n, 128n, 255n, 256n, 1000n, 4095n, 4096n, 65_535n, 65_536n,
  100_000_000n, 100_000_001n, 2n ** 27n, 2n ** 31n - 1n, 2n ** 31n, 2n ** 32n - 1n, 2n ** 32n, 2n ** 40n,
  2n ** 53n - 1n, 2n ** 53n, 2n ** 53n + 1n, 2n ** 61n, 2n ** 62n, 2n ** 63n - 1n, 2n ** 63n, 2n ** 64n - 8n,
  2n ** 64n - 1n,
]; // prettier-ignore

export const pick = <T>(random: Random, items: readonly T[]): T => items[random.below(items.length)]!;
export const edge = (random: Random): bigint => pick(random, edges);

/** A number near `value`, or none at all like it. */
export function nearby(random: Random, value: bigint): bigint {
  const steps = [-64n, -8n, -1n, 1n, 2n, 8n, 32n, 128n];
  return random.below(2) === 0 ? BigInt.asUintN(64, value + pick(random, steps)) : edge(random);
}

/** Names that languages, file systems and terminals treat in ways of their own. */
export const oddTexts = [
  '', '__proto__', 'constructor', 'toString', '__metadata__', '..', '../x', '/etc/passwd', 'a/b', 'a\\b', 'C:\\x', '.',
  'a\0b', '\u202e', '名', '\ud83d\ude00', 'model.safetensors', 'weight', 'x'.repeat(70), 'y'.repeat(5000), '-1', 'NaN',
]; // prettier-ignore

/** One change that knows nothing of any format. */
export function spoil(random: Random, input: Buffer, others: readonly Buffer[]): Buffer {
  if (input.length === 0) return Buffer.from(pick(random, others));
  const at = random.below(input.length);
  const length = Math.min(input.length - at, 1 + random.below(random.below(4) === 0 ? 300 : 16));
  const before = input.subarray(0, at);
  switch (random.below(9)) {
    case 0:
      return changed(input, (bytes) => (bytes[at] = bytes[at]! ^ (1 << random.below(8))));
    case 1:
      return changed(input, (bytes) => (bytes[at] = random.below(256)));
    case 2:
      return changed(input, (bytes) => (bytes[at] = (bytes[at]! + 1 + random.below(16) - 8) & 255));
    case 3:
      return changed(input, (bytes) => {
        const width = pick(random, [1, 2, 4, 8]);
        const value = edge(random);
        for (let i = 0; i < width && at + i < bytes.length; i++)
          bytes[at + i] = Number((value >> BigInt(8 * i)) & 255n);
      });
    case 4:
      return Buffer.from(before);
    case 5:
      return Buffer.concat([before, input.subarray(at + length)]);
    case 6:
      return Buffer.concat([before, input.subarray(at, at + length), input.subarray(at)]);
    case 7: {
      const other = pick(random, others);
      const from = random.below(other.length + 1);
      return Buffer.concat([before, other.subarray(from, from + length), input.subarray(at + length)]);
    }
    default:
      return Buffer.concat([before, Buffer.from(Array.from({ length }, () => random.below(256))), input.subarray(at)]);
  }
}

function changed(input: Buffer, change: (bytes: Buffer) => void): Buffer {
  const bytes = Buffer.from(input);
  change(bytes);
  return bytes;
}

/** A list with one item left out, doubled, moved, or changed by `change`. */
export function shuffled<T>(random: Random, items: readonly T[], change: (item: T) => T): T[] {
  const out = [...items];
  if (out.length === 0) return out;
  const at = random.below(out.length);
  const to = random.below(out.length);
  switch (random.below(6)) {
    case 0:
      out.splice(at, 1);
      break;
    case 1:
      out.splice(to, 0, out[at]!);
      break;
    case 2:
      [out[at], out[to]] = [out[to]!, out[at]!];
      break;
    default:
      out[at] = change(out[at]!);
  }
  return out;
}

export function u64(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt.asUintN(64, BigInt(value)));
  return bytes;
}

export function u32(value: number | bigint): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(Number(BigInt.asUintN(32, BigInt(value))));
  return bytes;
}
