import { bug } from '../base/errors.js';
import type { FloatDType } from '../base/dtype.js';
import {
  attentionBackward,
  binary,
  binaryKinds,
  cast,
  expertCombineBackward,
  fakeQuantBackward,
  fill,
  gemm,
  groupedGemm,
  groupedOuter,
  reduce,
  reduceKinds,
  rope,
  routeBackward,
  scatterAdd,
  scorings,
  softmaxBackward,
  swigluBackward,
  unary,
  unaryKinds,
  type UnaryKind,
} from './ops.js';
import type { Scope, Tensor } from './tensor.js';

/** Where a rule puts gradients; inputs are named by their position among the op's tensors. */
export interface Gradients {
  readonly wants: (input: number) => boolean;
  /** Adds `d`, of the input's shape, to its gradient. Of a result that the rule made itself it is the last use. */
  readonly give: (input: number, d: Tensor) => void;
  /**
   * The gradient's own memory, for ops that add: out = result + beta out. undefined: not wanted; null: the input is
   * broadcast, so `give` is to be used.
   */
  readonly into: (input: number) => { out: Tensor; beta: 0 | 1 } | undefined | null;
}

export interface Backward extends Gradients {
  /** As in native/backend.h, output first. */
  readonly tensors: readonly (Tensor | undefined)[];
  readonly ints: readonly number[];
  readonly floats: readonly number[];
  /** Gradient of the output. */
  readonly dy: Tensor;
  /** For temporaries. */
  readonly scope: Scope;
}

export interface Rule {
  /** Positions of the inputs that have gradients. */
  readonly inputs: readonly number[];
  /** Its output is a weight as soon as the inputs with gradients are: the others are codes or fixed scales. */
  readonly ofWeights?: boolean;
  /** Adds optional outputs that the backward pass needs, before the op runs. */
  prepare?(tensors: (Tensor | undefined)[], scope: Scope): void;
  backward(b: Backward): void;
}

/** Rows of attention's backward pass need dense last dimensions. */
const dense = (scope: Scope, x: Tensor): Tensor => (x.contiguous ? x : cast(scope, x, x.dtype));
const nameOf = <K extends string>(kinds: Readonly<Record<K, number>>, n: number): K =>
  (Object.keys(kinds) as K[]).find((key) => kinds[key] === n)!;

/** A product's gradient into memory that adds up, or given. */
function product(b: Backward, input: number, x: Tensor, y: Tensor, alpha: number): void {
  const place = b.into(input);
  if (place === undefined) return;
  if (place === null) b.give(input, gemm(b.scope, x, y, { alpha }));
  else gemm(b.scope, x, y, { alpha, ...place });
}

const unaryRules: Partial<Record<UnaryKind, (b: Backward, x: Tensor, y: Tensor) => Tensor>> = {
  neg: ({ scope, dy }) => unary(scope, 'neg', dy),
  affine: ({ scope, dy, floats }) => unary(scope, 'affine', dy, floats[0], 0),
  square: ({ scope, dy }, x) => binary(scope, 'mul', dy, x, { alpha: 2 }),
  /** s (1 - s) */
  sigmoid: ({ scope, dy }, _, y) => {
    const rest = unary(scope, 'affine', y, -1, 1);
    binary(scope, 'mul', rest, y, { out: rest });
    return binary(scope, 'mul', rest, dy, { out: rest });
  },
  relu: passWhereSame,
  clamp: passWhereSame,
};

/** Through what came out as it went in. */
function passWhereSame({ scope, dy }: Backward, x: Tensor, y: Tensor): Tensor {
  const same = binary(scope, 'equal', x, y);
  return binary(scope, 'mul', same, dy, { out: same });
}

/** One backward rule an op of native/backend.h; null: its outputs have no gradients. */
export const rules: Readonly<Record<string, Rule | null>> = {
  fill: null,
  random: null,
  norm_add: null,
  expert_sort: null,

  copy: { inputs: [1], ofWeights: true, backward: ({ give, dy }) => give(1, dy) },

  reduce: {
    inputs: [1],
    backward: ({ tensors, ints, dy, give }) => {
      if (ints[0] !== reduceKinds.sum) throw bug('no backward rule for a reduction other than a sum');
      const [outer, n, inner] = tensors[1]!.shape as [number, number, number];
      give(1, dy.view(outer, 1, inner).expand(outer, n, inner));
    },
  },

  gather: {
    inputs: [1],
    backward: ({ tensors, ints, into, dy }) => {
      if (ints[0] !== 0) throw bug('no backward rule for the gathering of columns');
      const place = into(1);
      if (!place) return;
      if (place.beta === 0) fill(place.out, 0);
      scatterAdd(place.out, dy, tensors[2]!);
    },
  },

  gemm: {
    inputs: [1, 2, 3],
    backward: (b) => {
      const [c, x, y] = b.tensors as [Tensor, Tensor, Tensor];
      const [alpha, beta] = b.floats as [number, number];
      if (beta !== 0) throw bug('no backward rule for a product that adds to its output');
      // The products of the backward pass run in the precision of the forward pass, also where its output was wider.
      const narrow = x.dtype === y.dtype && x.dtype !== b.dy.dtype;
      const dy = narrow ? cast(b.scope, b.dy, x.dtype) : b.dy;
      product(b, 1, dy, y.transpose(), alpha);
      product(b, 2, x.transpose(), dy, alpha);
      if (b.wants(3)) b.give(3, reduce(b.scope, 'sum', dense(b.scope, b.dy).view(-1, c.dim(-1)), 0));
    },
  },

  grouped_gemm: {
    inputs: [1, 2],
    backward: ({ tensors, scope, dy, give, wants, into }) => {
      const [, x, w, offsets] = tensors as [Tensor, Tensor, Tensor, Tensor];
      if (wants(1)) give(1, groupedGemm(scope, dy, w.transpose(1, 2), offsets, x.dtype as FloatDType));
      const place = into(2);
      if (!place) return;
      if (place.beta === 0) fill(place.out, 0);
      groupedOuter(place.out, dy, x, offsets);
    },
  },

  unary: {
    inputs: [1],
    backward: (b) => {
      const kind = nameOf(unaryKinds, b.ints[0]!);
      const rule = unaryRules[kind];
      if (!rule) throw bug(`no backward rule for the unary op ${kind}`);
      b.give(1, rule(b, b.tensors[1]!, b.tensors[0]!));
    },
  },

  binary: {
    inputs: [1, 2],
    backward: (b) => {
      const { scope, dy, floats, give, wants } = b;
      const [, x, y] = b.tensors as [Tensor, Tensor, Tensor];
      const alpha = floats[0]!;
      const kind = nameOf(binaryKinds, b.ints[0]!);
      const scaled = (by: number) => (by === 1 ? dy : unary(scope, 'affine', dy, by, 0));
      switch (kind) {
        case 'add':
        case 'sub':
          give(1, dy);
          if (wants(2)) give(2, scaled(kind === 'add' ? alpha : -alpha));
          return;
        case 'mul':
          if (wants(1)) give(1, binary(scope, 'mul', dy, y, { alpha }));
          if (wants(2)) give(2, binary(scope, 'mul', dy, x, { alpha }));
          return;
        default:
          throw bug(`no backward rule for the binary op ${kind}`);
      }
    },
  },

  rmsnorm: {
    inputs: [1, 2],
    prepare: (tensors, scope) => {
      tensors[3] ??= scope.empty('f32', [tensors[1]!.dim(0)]);
    },
    backward: ({ tensors, floats, scope, dy, give, wants }) => {
      const [, x, w, rstd] = tensors as [Tensor, Tensor, Tensor | undefined, Tensor];
      const dx = scope.empty(dy.dtype, x.shape);
      const dw = wants(2) ? scope.zeros('f32', [x.dim(1)]) : undefined;
      dx.device.run('rmsnorm_backward', [dx, dw, dy, x, w, rstd], [], [floats[1]!]);
      give(1, dx);
      if (dw) give(2, dw);
    },
  },

  swiglu: {
    inputs: [1, 2],
    backward: ({ tensors, ints, floats, scope, dy, give }) => {
      const [, gate, up] = tensors as [Tensor, Tensor, Tensor];
      const { dgate, dup } = swigluBackward(scope, dy, gate, up, nameOf(unaryKinds, ints[0]!), floats[0]);
      give(1, dgate);
      give(2, dup);
    },
  },

  softmax: {
    inputs: [1],
    backward: ({ tensors, floats, scope, dy, give }) => give(1, softmaxBackward(scope, dy, tensors[0]!, floats[0])),
  },

  rope: {
    inputs: [1],
    backward: ({ tensors, ints, scope, dy, give }) => {
      const [, , cos, sin, positions] = tensors as [Tensor, Tensor, Tensor, Tensor, Tensor];
      const [interleaved, fromEnd, inverse] = ints.map((flag) => flag === 1) as [boolean, boolean, boolean];
      give(1, rope(scope, dy, cos, sin, positions, { interleaved, fromEnd, inverse: !inverse }));
    },
  },

  attention: {
    inputs: [1, 2, 3],
    prepare: (tensors, scope) => {
      const [, q] = tensors as [Tensor, Tensor];
      if (tensors[6]) throw bug('no backward rule for attention whose log-sum-exp is used');
      tensors[6] ??= scope.empty('f32', [q.dim(0), q.dim(2), q.dim(1)]);
    },
    backward: ({ tensors, ints, floats, scope, dy, give }) => {
      const [o, q, k, v, lengths, , lse] = tensors as [Tensor, Tensor, Tensor, Tensor, Tensor?, Tensor?, Tensor?];
      if (floats[1] !== 0) throw bug('no backward rule for attention with a soft cap');
      const options = { causal: ints[0] === 1, window: ints[1]!, offset: ints[2]!, scale: floats[0]! };
      const d = attentionBackward(
        scope,
        dense(scope, dy),
        { o, q, k, v, lse: lse! },
        { ...options, ...(lengths && { lengths }) },
      );
      give(1, d.dq);
      give(2, d.dk);
      give(3, d.dv);
    },
  },

  route: {
    inputs: [2],
    backward: ({ tensors, ints, floats, scope, dy, give }) => {
      const [, idx, logits] = tensors as [Tensor, Tensor, Tensor];
      const options = { scoring: nameOf(scorings, ints[0]!), normalize: ints[4] === 1, scale: floats[0]! };
      give(2, routeBackward(scope, dy, { logits, idx }, options));
    },
  },

  expert_combine: {
    inputs: [1, 3, 4],
    backward: ({ tensors, scope, dy, give }) => {
      const [, y, place, w] = tensors as [Tensor, Tensor, Tensor, Tensor];
      const { dy: d, dw } = expertCombineBackward(scope, dy, { y, place, w });
      give(1, d);
      give(3, dw);
      if (tensors[4]) give(4, dy);
    },
  },

  fake_quant: {
    inputs: [1, 2, 3],
    ofWeights: true,
    backward: ({ tensors, ints, scope, dy, give }) => {
      const [, w, scale, zero] = tensors as [Tensor, Tensor, Tensor, Tensor | undefined];
      const [low, high, group] = ints as [number, number, number];
      const d = fakeQuantBackward(scope, dy, w, { scale, zero, low, high, group });
      give(1, d.dw);
      give(2, d.dscale);
      if (d.dzero) give(3, d.dzero);
    },
  },

  /** Codes are fixed; scales learn: d scale = sum of dy (code - zero) over the group. */
  dequantize: {
    inputs: [2],
    ofWeights: true,
    backward: ({ tensors, ints, scope, dy, give }) => {
      const [, codes, scale, zero, order] = tensors as [Tensor, Tensor, Tensor, Tensor?, Tensor?];
      const [n, groups] = [scale.dim(0), scale.dim(1)];
      const group = ints[0]!;
      if (order || groups * group !== codes.dim(1))
        throw bug('no backward rule for groups that are no runs of columns');
      const values = cast(scope, codes, 'f32').view(n, groups, group);
      if (zero) binary(scope, 'sub', values, zero.view(n, groups, 1), { out: values });
      binary(scope, 'mul', values, dense(scope, dy).view(n, groups, group), { out: values });
      give(2, reduce(scope, 'sum', values, 2));
    },
  },
};
