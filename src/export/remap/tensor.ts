import { binary, copyInto, fill, gather, reduce } from '../../tensor/ops.js';
import { Scope, type Tensor } from '../../tensor/tensor.js';
import type { RowPlan } from './rows.js';

/** New rows that are averaged at once. */
const rowsAtOnce = 8192;

/** A tensor with a row for each token, `old` [V, C], for the new vocabulary: [size, C] in the same precision. */
export function remapped(s: Scope, old: Tensor, { size, known, exact, pieces }: RowPlan): Tensor {
  using work = new Scope(s.device);
  const [rows, columns] = [old.dim(0), old.dim(1)];
  // The old rows, behind them the averages, behind them the mean of all; then each new row is one of these.
  const all = work.empty(old.dtype, [rows + pieces.size + 1, columns]);
  copyInto(all.slice(0, 0, rows), old);
  const source = Int32Array.from(exact, (row) => (row >= 0 ? row : rows + pieces.size));
  let at = rows;
  for (const [length, group] of byLength(pieces)) {
    for (let from = 0; from < group.length; from += rowsAtOnce) {
      const part = group.slice(from, from + rowsAtOnce);
      using chunk = new Scope(s.device);
      const sum = chunk.empty('f32', [part.length, columns]);
      fill(sum, 0);
      for (let k = 0; k < length; k++) {
        const ids = chunk.from(
          'i32',
          [part.length],
          Int32Array.from(part, ([, own]) => own[k]!),
        );
        const piece = gather(chunk, old, ids, 0, 'f32');
        binary(chunk, 'add', sum, piece, { alpha: 1 / length, out: sum });
        chunk.free(piece);
      }
      copyInto(all.slice(0, at, at + part.length), sum);
      part.forEach(([id], i) => (source[id] = at + i));
      at += part.length;
    }
  }
  copyInto(all.slice(0, at, at + 1), reduce(work, 'mean', old.slice(0, 0, known), 0).view(1, columns));
  return gather(s, all, work.from('i32', [size], source));
}

/** Tokens of equally many pieces together. */
function byLength(pieces: RowPlan['pieces']): Map<number, [id: number, pieces: readonly number[]][]> {
  const groups = new Map<number, [number, readonly number[]][]>();
  for (const [id, own] of pieces) {
    const group = groups.get(own.length);
    if (group) group.push([id, own]);
    else groups.set(own.length, [[id, own]]);
  }
  return groups;
}
