import { bug } from '../../base/errors.js';
import type { Collective } from '../../backend/device.js';
import type { Group } from '../../backend/group.js';
import type { Tensor } from '../tensor.js';
import { ensure, ensureContiguous } from './check.js';

/** Elements [from, to) of a tensor that are rank `rank`'s part of it among `ranks`. */
export function partOf(count: number, rank: number, ranks: number): [from: number, to: number] {
  const part = Math.ceil(count / ranks);
  return [Math.min(count, rank * part), Math.min(count, (rank + 1) * part)];
}

/** x[rank][i] := the sum over ranks of x[.][i]. All three: f32 or bf16, contiguous, in place. */
export const allReduce = (group: Group, x: readonly (readonly Tensor[])[]): void => together('all_reduce', group, x);
/** The rank's part (`partOf`) of x[rank][i] := its sum over ranks; the rest is undefined. */
export const reduceScatter = (group: Group, x: readonly (readonly Tensor[])[]): void =>
  together('reduce_scatter', group, x);
/** Every rank's part of x[.][i] goes to all. */
export const allGather = (group: Group, x: readonly (readonly Tensor[])[]): void => together('all_gather', group, x);

function together(kind: Collective, group: Group, x: readonly (readonly Tensor[])[]): void {
  const { devices } = group;
  if (x.length !== devices.length) throw bug(`${kind}: tensors of ${x.length} ranks, the group has ${devices.length}`);
  x.forEach((own, rank) => {
    ensure(own.length === x[0]!.length, kind, 'as many tensors on each rank');
    ensureContiguous(kind, ...own);
    own.forEach((t, i) => {
      const first = x[0]![i]!;
      ensure(t.device === devices[rank], kind, `tensor of another device than rank ${rank}'s`, t);
      ensure(t.dtype === 'f32' || t.dtype === 'bf16', kind, 'f32 or bf16 expected', t);
      ensure(t.dtype === first.dtype && t.count === first.count, kind, 'the same size on each rank', t, first);
    });
  });
  if (x[0]!.length > 0) group.run(kind, x);
}
