import { bug } from '../base/errors.js';
import { dtypeSize, type DType, type FloatDType } from '../base/dtype.js';
import type { Device, Op } from '../backend/device.js';
import { binary, cast, copyInto, fill, reduce } from './ops.js';
import { rules, type Gradients } from './rules.js';
import { Scope, Tensor } from './tensor.js';

type Storage = Tensor['storage'];

/** One recorded op: its tensors as they were when it ran. */
interface Entry {
  readonly op: string;
  readonly tensors: (Tensor | undefined)[];
  /** Where gradients of inputs go: the tensors, before copies were taken of inputs that the op overwrote. */
  readonly targets: readonly (Tensor | undefined)[];
  readonly ints: readonly number[];
  readonly floats: readonly number[];
  readonly inPlace: boolean;
}

/** Keeps everything until it ends: what a forward pass drops early, its backward pass still needs. */
class KeepingScope extends Scope {
  override free(): void {
    // at the end, with all others
  }
}

/**
 * Reverse-mode differentiation. While `record` runs, every op that depends on a leaf is noted as it is enqueued
 * (whatever code enqueued it: forward passes know nothing of this), and `backward` applies one rule an op
 * (rules.ts), last op first. Gradients belong to memory, not to views: a view's gradient is the same view of its
 * memory's gradient, so slices, transposes and broadcasts need no rules.
 *
 * Weights and what is computed from weights alone have gradients in fp32, activations in their own precision.
 */
export class Tape implements Disposable {
  /** For the intermediates of the recorded pass. */
  readonly scope: Scope;
  readonly #device: Device;
  readonly #entries: Entry[] = [];
  readonly #tracked = new Set<Storage>();
  readonly #precise = new Set<Storage>();
  /** Gradients by memory, flat. */
  readonly #grads = new Map<Storage, Tensor>();
  /** Gradients that are accumulated for the caller and never freed here. */
  readonly #outside = new Set<Storage>();
  readonly #gradScope: Scope;

  constructor(device: Device) {
    this.#device = device;
    this.scope = new KeepingScope(device);
    this.#gradScope = new Scope(device);
  }

  /** Gradients for `x` are wanted. With `grad` (f32, x's shape, contiguous) x is a weight: they are added there. */
  leaf(x: Tensor, grad?: Tensor): void {
    this.#tracked.add(x.storage);
    if (grad === undefined) return;
    if (!x.contiguous || !grad.contiguous || grad.dtype !== 'f32' || x.count * dtypeSize(x.dtype) !== x.storage.bytes) {
      throw bug('a leaf must be all of its memory, its gradient contiguous fp32');
    }
    this.#precise.add(x.storage);
    this.#outside.add(x.storage);
    this.#grads.set(x.storage, grad.view(-1));
  }

  /** Runs `body`, which enqueues the forward pass and awaits nothing. */
  record<R>(body: () => R): R {
    if (this.#device.watch) throw bug('two tapes record at once');
    this.#device.watch = (op) => this.#note(op);
    try {
      return body();
    } finally {
      this.#device.watch = undefined;
    }
  }

  #note(op: Op): void {
    const rule = rules[op.name];
    if (rule === null) return; // has no gradient
    const tensors = op.tensors as (Tensor | undefined)[];
    // An op without a rule is an error only when a gradient arrives at it.
    const inputs = rule ? rule.inputs : tensors.map((_, i) => i).slice(1);
    const tracked = inputs.filter((i) => tensors[i] && this.#tracked.has(tensors[i].storage));
    if (tracked.length === 0) return;
    const out = tensors[0]!;
    const inPlace = inputs.some((i) => tensors[i]?.storage === out.storage);
    const targets = [...tensors];
    rule?.prepare?.(tensors, this.scope);
    const values = [...tensors];
    if (inPlace) this.#save(out, values);
    const ofWeights = rule?.ofWeights ? tracked : inputs.filter((i) => tensors[i]);
    if (ofWeights.every((i) => this.#precise.has(tensors[i]!.storage))) this.#precise.add(out.storage);
    this.#tracked.add(out.storage);
    this.#entries.push({ op: op.name, tensors: values, targets, ints: op.ints, floats: op.floats, inPlace });
  }

  /** Before memory is overwritten: a copy of it takes its place in what was recorded, and as the op's own input. */
  #save(out: Tensor, values: (Tensor | undefined)[]): void {
    const all = new Tensor(out.storage, 0, out.dtype, [out.storage.bytes / dtypeSize(out.dtype)], [1]);
    const saved = constant(this.#device, () => cast(this.scope, all, all.dtype));
    const replace = (tensors: (Tensor | undefined)[], first: number) => {
      for (let i = first; i < tensors.length; i++) {
        const x = tensors[i];
        if (x?.storage === out.storage) tensors[i] = viewLike(x, saved);
      }
    };
    for (const entry of this.#entries) replace(entry.tensors, 0);
    replace(values, 1);
  }

  /** Adds `dy` to the gradient of `y`. */
  seed(y: Tensor, dy: Tensor): void {
    if (!this.#tracked.has(y.storage)) throw bug('a gradient for a tensor that depends on no leaf');
    this.#add(y, dy);
  }

  /** The gradient that has arrived at `x` so far, of x's shape; undefined: none has. */
  grad(x: Tensor): Tensor | undefined {
    const flat = this.#grads.get(x.storage);
    return flat && viewLike(x, flat);
  }

  /** Takes the gradient of a leaf out of the tape, into `scope`. */
  take(x: Tensor, scope: Scope): Tensor {
    const grad = this.grad(x);
    if (!grad || !this.#gradScope.owns(grad)) throw bug('no gradient arrived');
    this.#grads.delete(x.storage);
    return this.#gradScope.move(grad, scope);
  }

  /** From the seeds back to the leaves; enqueues only. */
  backward(): void {
    if (this.#device.watch) throw bug('backward inside of record');
    for (const entry of this.#entries.reverse()) {
      using scope = new Scope(this.#device);
      const out = entry.targets[0]!;
      const flat = this.#grads.get(out.storage);
      if (!flat) continue;
      let dy = viewLike(out, flat);
      if (entry.inPlace) {
        // What was there before the op has another gradient than what is there after it.
        const after = dy;
        dy = cast(scope, after, after.dtype);
        fill(after, 0);
      }
      const rule = rules[entry.op];
      if (!rule) throw bug(`no backward rule for the op ${entry.op}`);
      rule.backward({ ...entry, scope, dy, ...this.#gradients(entry, scope) });
      const whole = out.bytes === out.storage.bytes && out.contiguous;
      if (whole && !entry.inPlace && !this.#outside.has(out.storage)) {
        this.#grads.delete(out.storage);
        this.#gradScope.free(flat);
      }
    }
    this.#entries.length = 0;
  }

  #gradients({ targets }: Entry, scope: Scope): Gradients {
    const wanted = (i: number): Tensor | undefined => {
      const target = targets[i];
      return target && this.#tracked.has(target.storage) ? target : undefined;
    };
    return {
      wants: (i) => wanted(i) !== undefined,
      give: (i, d) => {
        const target = wanted(i);
        if (target) this.#add(target, d, scope);
      },
      into: (i) => {
        const target = wanted(i);
        if (!target) return undefined;
        if (target.strides.some((stride, d) => stride === 0 && target.dim(d) > 1)) return null;
        const fresh = !this.#grads.has(target.storage) && target.bytes === target.storage.bytes;
        return { out: viewLike(target, this.#flat(target, fresh)), beta: fresh ? 0 : 1 };
      },
    };
  }

  /** Gradient memory for all of x's storage; zeros unless it is about to be written whole. */
  #flat(x: Tensor, fresh = false): Tensor {
    const known = this.#grads.get(x.storage);
    if (known) return known;
    const dtype: DType = this.#precise.has(x.storage) ? 'f32' : x.dtype;
    const n = [x.storage.bytes / dtypeSize(x.dtype)];
    const flat = fresh ? this.#gradScope.empty(dtype, n) : this.#gradScope.zeros(dtype, n);
    this.#grads.set(x.storage, flat);
    return flat;
  }

  #add(x: Tensor, d: Tensor, scope?: Scope): void {
    // Broadcast dimensions add up.
    const axis = x.strides.findIndex((stride, i) => stride === 0 && x.dim(i) > 1);
    if (axis !== -1) {
      using work = new Scope(this.#device);
      const dense = d.contiguous ? d : cast(work, d, d.dtype);
      const sum = reduce(work, 'sum', dense, axis);
      const rest = new Tensor(
        x.storage,
        x.byteOffset,
        x.dtype,
        x.shape.toSpliced(axis, 1),
        x.strides.toSpliced(axis, 1),
      );
      this.#add(rest, sum);
      return;
    }
    const whole = x.contiguous && x.bytes === x.storage.bytes;
    if (!this.#grads.has(x.storage) && whole) {
      const dtype: FloatDType = this.#precise.has(x.storage) ? 'f32' : (x.dtype as FloatDType);
      // A rule's own result becomes the gradient; a view of something else is copied.
      if (scope?.owns(d) && d.dtype === dtype && d.contiguous && d.bytes === d.storage.bytes) {
        this.#grads.set(x.storage, scope.move(d, this.#gradScope).view(-1));
        return;
      }
      copyInto(viewLike(x, this.#flat(x, true)), d.shape.length === x.shape.length ? d : d.view(...x.shape));
      return;
    }
    const grad = viewLike(x, this.#flat(x));
    binary(this.#gradScope, 'add', grad, d.shape.length === x.shape.length ? d : d.view(...x.shape), { out: grad });
  }

  [Symbol.dispose](): void {
    this.scope[Symbol.dispose]();
    this.#gradScope[Symbol.dispose]();
  }
}

/** Runs `body` unseen by the tape that records: what it makes has no gradient. */
export function constant<R>(device: Device, body: () => R): R {
  const { watch } = device;
  device.watch = undefined;
  try {
    return body();
  } finally {
    device.watch = watch;
  }
}

/** The view that `x` is of its storage, of the gradient of that storage. */
function viewLike(x: Tensor, flat: Tensor): Tensor {
  const offset = (x.byteOffset / dtypeSize(x.dtype)) * dtypeSize(flat.dtype) + flat.byteOffset;
  return new Tensor(flat.storage, offset, flat.dtype, x.shape, x.strides);
}
