import type { FloatDType } from '../../src/base/dtype.js';
import * as ops from '../../src/tensor/ops.js';
import type { Tensor } from '../../src/tensor/tensor.js';
import type { Inputs } from './cases.js';

type ForFloats = (
  name: string,
  run: (in_: Inputs, dtype: FloatDType) => Tensor[] | Promise<Tensor[]>,
  loose?: number,
) => void;

interface BackwardShape {
  readonly b?: number;
  readonly s: number;
  /** Keys; as many as queries when absent. */
  readonly t?: number;
  readonly h: number;
  readonly kv: number;
  readonly d: number;
  readonly dv: number;
  readonly causal?: boolean;
  readonly window?: number;
  readonly offset?: number;
  readonly lengths?: number[];
}
const backwardShapes: BackwardShape[] = [
  { b: 2, s: 70, h: 4, kv: 2, d: 64, dv: 64 },
  { s: 130, h: 2, kv: 2, d: 192, dv: 128 },
  { s: 40, h: 2, kv: 1, d: 48, dv: 32, window: 16 },
  { s: 257, h: 8, kv: 2, d: 128, dv: 128 },
  { s: 257, h: 4, kv: 1, d: 128, dv: 128, causal: false },
  { b: 2, s: 257, h: 2, kv: 1, d: 192, dv: 128, window: 48, lengths: [200, 257] },
  { b: 3, s: 129, h: 4, kv: 1, d: 128, dv: 128, lengths: [129, 0, 33] },
  { b: 2, s: 90, t: 190, h: 4, kv: 1, d: 128, dv: 128, offset: 100, lengths: [190, 95] },
  { s: 90, t: 70, h: 2, kv: 1, d: 64, dv: 64, offset: -20 },
  { s: 150, h: 2, kv: 1, d: 128, dv: 128, causal: false, window: 33 },
  { s: 140, h: 2, kv: 1, d: 256, dv: 256 },
  { s: 17, h: 2, kv: 2, d: 20, dv: 12 },
];

/** The backward ops and the optimizer, each on both devices. */
export function gradientCases(forFloats: ForFloats): void {
  for (const c of [5, 65, 4096]) {
    forFloats(`rmsnorm_backward ${c}`, (in_, d) => {
      const [x, w, dy] = [in_.normal(d, [19, c]), in_.normal(d, [c]), in_.normal(d, [19, c])];
      const rstd = in_.s.empty('f32', [19]);
      ops.rmsnorm(in_.s, x, w, 1e-6, { rstd });
      const dw = in_.normal('f32', [c]);
      return [ops.rmsnormBackward(in_.s, dy, x, w, rstd, { dw }), dw];
    }, 4); // prettier-ignore
    forFloats(`softmax_backward ${c}`, (in_, d) => {
      const y = ops.softmax(in_.s, in_.normal(d, [19, c], 3), 0.7);
      return [ops.softmaxBackward(in_.s, in_.normal(d, [19, c]), y, 0.7)];
    }, 4); // prettier-ignore
  }
  for (const activation of ['silu', 'gelu', 'gelu_tanh'] as const)
    forFloats(`swiglu_backward ${activation}`, (in_, d) => {
      const { dgate, dup } = ops.swigluBackward(in_.s, in_.normal(d, [19, 130]), in_.normal(d, [19, 130]), in_.normal(d, [19, 130]), activation); // prettier-ignore
      return [dgate, dup];
    });
  forFloats('cross_entropy_backward', (in_, d) => {
    const [logits, targets] = [in_.normal(d, [23, 3001], 4), in_.integers([23], -1, 3000)];
    const lse = in_.s.empty('f32', [23]);
    ops.crossEntropy(in_.s, logits, targets, { lse });
    return [ops.crossEntropyBackward(in_.s, logits, targets, lse, 0.25, 'f32')];
  }, 4); // prettier-ignore
  forFloats('kl_backward', (in_, d) => [
    ops.klBackward(in_.s, in_.normal(d, [23, 3001], 4), in_.normal(d, [23, 3001], 4), 0.25, 'f32'),
  ], 4); // prettier-ignore
  for (const shape of backwardShapes) {
    const { b = 1, s, t = s, h, kv, d: width, dv, lengths, ...mask } = shape;
    const label = Object.entries({ ...mask, ...(lengths && { lengths }) }).map(([k, v]) => ` ${k} ${String(v)}`);
    forFloats(`attention_backward B${b} S${s} T${t} H${h}/${kv} D${width}/${dv}${label.join('')}`, (in_, d) => {
      const [q, k, v] = [in_.normal(d, [b, s, h, width]), in_.normal(d, [b, t, kv, width]), in_.normal(d, [b, t, kv, dv])]; // prettier-ignore
      const lse = in_.s.empty('f32', [b, h, s]);
      const options = {
        scale: width ** -0.5,
        ...mask,
        ...(lengths && { lengths: in_.s.from('i32', [b], Int32Array.from(lengths)) }),
      };
      const o = ops.attention(in_.s, q, k, v, { ...options, lse });
      const { dq, dk, dv: values } = ops.attentionBackward(in_.s, in_.normal(d, [b, s, h, dv]), { o, q, k, v, lse }, options); // prettier-ignore
      return [dq, dk, values];
    }, 8); // prettier-ignore
  }
  for (const scoring of ['softmax', 'sigmoid', 'sqrtsoftplus'] as const)
    for (const normalize of [false, true])
      forFloats(`route_backward ${scoring}${normalize ? ' normalised' : ''}`, (in_, d) => {
        const logits = in_.normal(d, [77, 64]);
        const options = { topK: 6, scoring, normalize, scale: 2.5 };
        const { idx } = ops.route(in_.s, logits, options);
        return [ops.routeBackward(in_.s, in_.normal('f32', [77, 6]), { logits, idx }, options)];
      });
  for (const [experts, active] of [
    [64, 48],
    [7, 3],
    [130, 1],
  ] as const)
    // prettier-ignore
    forFloats(`choice_gradient ${active} of ${experts}`, (in_, d) => {
      const [scores, c] = [in_.normal(d, [77, experts]), ops.unary(in_.s, 'square', in_.normal(d, [77, experts]))];
      return [ops.choiceGradient(in_.s, scores, c, { active, temperature: 0.25, scale: -0.01 })];
    });
  forFloats('expert_combine_backward, grouped_outer', (in_, d) => {
    const { w, idx } = ops.route(in_.s, in_.normal('f32', [70, 16]), { topK: 3, scoring: 'softmax' });
    const order = ops.expertSort(in_.s, idx, 16);
    const [y, dout] = [in_.normal(d, [210, 40]), in_.normal(d, [70, 40])];
    const { dy, dw } = ops.expertCombineBackward(in_.s, dout, { y, place: order.place, w });
    const db = in_.normal('f32', [16, 40, 33]);
    ops.groupedOuter(db, dy, in_.normal(d, [210, 33]), order.offsets);
    return [dy, dw, db];
  }, 4); // prettier-ignore
  forFloats('fake_quant and its gradients', (in_, d) => {
    const w = in_.normal('f32', [45, 256]);
    const grid = ops.scaleSearch(in_.s, w, { low: -8, high: 7, group: 64, points: 5, from: 0.5, to: 0.9, freeSign: true }); // prettier-ignore
    const { dw, dscale } = ops.fakeQuantBackward(in_.s, in_.normal(d, [45, 256]), w, grid);
    return [ops.fakeQuant(in_.s, w, grid, d), dw, dscale];
  }, 4); // prettier-ignore
  forFloats('adamw', (in_, d) => {
    const [p, m, v] = [in_.normal('f32', [1001]), in_.normal('f32', [1001]), ops.unary(in_.s, 'square', in_.normal('f32', [1001]))]; // prettier-ignore
    const clip = in_.s.from('f32', [1], Float32Array.of(0.3));
    ops.adamw(p, m, v, in_.normal(d, [1001]), { step: 3, lr: 0.01, decay: 0.1, clip });
    return [p, m, v];
  });
}
