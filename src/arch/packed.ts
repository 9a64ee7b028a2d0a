import type { FloatDType } from '../base/dtype.js';
import { storedDType } from '../layout/check.js';
import type { Load, StoredLinear } from '../layout/types.js';
import { cast, pack, type PackedInt4 } from '../tensor/ops.js';
import { Scope } from '../tensor/tensor.js';

/**
 * A stored linear [n, k] as int4_matmul reads it, whatever its layout: the same codes, scales and zero points, exactly.
 * Undefined for what it does not take, or only by unpacking it: other widths, groups that are no runs of neighbouring
 * columns or of other sizes, zero points beyond 4 bits or between the codes.
 */
export async function readPacked(
  scope: Scope,
  linear: StoredLinear,
  load: (scope: Scope) => Load,
  n: number,
  k: number,
): Promise<PackedInt4 | undefined> {
  if (linear.bits !== 4) return undefined;
  using work = new Scope(scope.device);
  const { codes, grid } = await linear.read(work, load(work), n, k);
  const group = Math.min(grid.group, k);
  // GPTQ stores the group of each column, in order or not.
  const groups = await grid.columnGroup?.int32();
  if (groups?.some((g, j) => g !== Math.floor(j / group))) return undefined;
  if (!taken(scope.device.kind, k, group)) return undefined;
  const zeros = await grid.zero?.float32();
  if (zeros?.some((zero) => !Number.isInteger(zero) || zero < -8 || zero > 7)) return undefined;
  const middle = zeros === undefined || zeros.every((zero) => zero === 0);
  const stored = [...linear.parts.values()].map(storedDType).find((type) => type === 'f16' || type === 'bf16');
  return {
    words: pack(scope, codes, { bits: 4, bias: 8, axis: 1 }),
    scale: cast(scope, grid.scale, (stored as FloatDType | undefined) ?? 'f32'),
    zero: middle ? undefined : pack(scope, cast(work, grid.zero!, 'i8'), { bits: 4, bias: 8, axis: 0 }),
    group,
  };
}

/** What a backend multiplies as it is: see native/cpu/int4.cc and native/cuda/int4.cu. */
const taken = (kind: string, k: number, group: number): boolean =>
  kind === 'cpu' ? group % 8 === 0 : k % 32 === 0 && group % 32 === 0 && (group % 128 === 0 || 128 % group === 0);
