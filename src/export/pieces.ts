import { arrangedShape, assembled } from '../formats/assembly.js';
import { encodedBytes } from '../formats/ggml.js';
import type { TensorEntry } from '../formats/types.js';

/** A run of a tensor's rows that can be read by itself. */
export interface Piece {
  readonly entry: TensorEntry;
  /** First element, in row-major order of the whole. */
  readonly start: number;
}

const product = (dims: readonly number[]): number => dims.reduce((n, d) => n * d, 1);

/**
 * Cuts a tensor into pieces of about `limit` elements: rows of plain and block-encoded tensors, rows of scale blocks of
 * block-scaled ones, the parts of one that is joined along its first axis. What does not fall into rows (views,
 * transpositions) stays whole. Order and sizes are those of the decoded tensor.
 */
export function piecesOf(entry: TensorEntry, limit: number): Piece[] {
  const { shape, encoding, strides } = entry;
  const whole = [{ entry, start: 0 }];
  if (strides !== undefined || shape.length < 2 || product(shape) <= limit) return whole;
  const columns = shape.at(-1)!;
  const rows = product(shape.slice(0, -1));
  switch (encoding.kind) {
    case 'plain':
    case 'ggml':
      return cut(rows, columns, limit, 1, (from, to) => rowsOf(entry, from, to, columns));
    case 'scaled': {
      const { scale, block } = encoding;
      return cut(rows, columns, limit, block[0], (from, to) => {
        const blocks = rowsOf(scale, from / block[0], Math.ceil(to / block[0]), scale.shape.at(-1)!);
        return { ...rowsOf(entry, from, to, columns), encoding: { ...encoding, scale: blocks } };
      });
    }
    case 'assembled': {
      if (encoding.axis !== 0 || encoding.parts.length < 2) return whole;
      let start = 0;
      return encoding.parts.map((part) => {
        const own = arrangedShape(part);
        const piece = { entry: assembled(entry.name, own, 0, [part]), start };
        start += product(own);
        return piece;
      });
    }
    case 'product':
    case 'rotated':
    case 'opaque':
      return whole;
  }
}

function cut(rows: number, columns: number, limit: number, unit: number, make: (from: number, to: number) => TensorEntry): Piece[] {
  const step = Math.max(1, Math.floor(limit / columns / unit)) * unit;
  return Array.from({ length: Math.ceil(rows / step) }, (_, i) => ({
    entry: make(i * step, Math.min(rows, (i + 1) * step)),
    start: i * step * columns,
  }));
} // prettier-ignore

/** Rows `from` to `to` of the tensor seen as [rows, columns]. */
function rowsOf(entry: TensorEntry, from: number, to: number, columns: number): TensorEntry {
  const bytes = encodedBytes([1, columns], entry.encoding);
  const span = { ...entry.span, offset: entry.span.offset + from * bytes, bytes: (to - from) * bytes };
  return { ...entry, shape: [to - from, columns], span };
}

/** Memory for what is under way, bytes; whoever asks for more than there is waits, first come, first served. */
export class Budget {
  readonly #total: number;
  #left: number;
  readonly #waiting: { readonly bytes: number; readonly resume: () => void }[] = [];

  constructor(bytes: number) {
    this.#total = this.#left = bytes;
  }

  /** Something larger than the whole budget runs alone. */
  async within<T>(bytes: number, run: () => Promise<T>): Promise<T> {
    const taken = Math.min(bytes, this.#total);
    if (this.#waiting.length > 0 || this.#left < taken) {
      await new Promise<void>((resume) => this.#waiting.push({ bytes: taken, resume }));
    } else this.#left -= taken;
    try {
      return await run();
    } finally {
      this.#left += taken;
      for (let next = this.#waiting[0]; next !== undefined && next.bytes <= this.#left; next = this.#waiting[0]) {
        this.#left -= next.bytes;
        this.#waiting.shift();
        next.resume();
      }
    }
  }
}

/** `items` in their order, but of `lanes` files in turn: as many files are written at once. */
export function interleaved<T>(items: readonly T[], fileOf: (item: T) => string, lanes: number): T[] {
  const files = new Map<string, T[]>();
  for (const item of items) {
    const file = fileOf(item);
    const own = files.get(file);
    if (own) own.push(item);
    else files.set(file, [item]);
  }
  const waiting = [...files.values()].map((own) => own.values());
  const active = waiting.splice(0, lanes);
  const order: T[] = [];
  for (let lane; (lane = active.shift()) !== undefined;) {
    const { done, value } = lane.next();
    if (done !== true) order.push(value);
    active.push(...(done === true ? waiting.splice(0, 1) : [lane]));
  }
  return order;
}
