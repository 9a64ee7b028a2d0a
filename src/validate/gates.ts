import { flagName } from '../base/options.js';
import type { GateResult, Interval, Profile, ValidateReport } from './report.js';

/** What a gate looks at: everything that was measured, before the verdict. */
export type Measurements = Omit<ValidateReport, 'gates' | 'passed' | 'diagnosis'>;

interface Measured {
  readonly value: number;
  readonly interval?: Interval;
  /** The worst layer, head, linear or text. */
  readonly where?: string;
  readonly layer?: number;
  /** A loss of the whole model: when it fails, the layer with the largest error is named beside `where`. */
  readonly ofModel?: true;
}

export interface Gate {
  /** Key of the bound in options: `maxKl` is the flag `--max-kl`. */
  readonly id: string;
  /** For tables. */
  readonly name: string;
  /** What is measured, in words. */
  readonly metric: string;
  /** max: value <= bound passes; min: value >= bound passes. */
  readonly direction: 'max' | 'min';
  /** null: measured and shown, but no gate unless the flag gives a bound. */
  readonly bounds: Readonly<Record<Profile, number | null>>;
  readonly meaning: string;
  readonly remedy: string;
  /** A sentence instead of numbers: this gate has nothing to measure here. */
  measure(m: Measurements): Measured | string;
}

/** `maxKl` -> `--max-kl`. */
export const gateFlag = (id: string): string => `--${flagName(id)}`;

/** `layer 2 (model.layers.2)`. */
const layerName = (m: Measurements, index: number): string => `layer ${index} (${m.layers[index]?.name ?? '?'})`;

/** The layer with the largest error of its own, which is where a loss in the logits most likely comes from. */
function worstLayer(
  m: Measurements,
): { readonly value: number; readonly where: string; readonly layer: number } | undefined {
  let worst: number | undefined;
  for (const [i, layer] of m.layers.entries()) {
    const error = layer.teacherForced.update;
    if (worst === undefined || !(error <= m.layers[worst]!.teacherForced.update)) worst = i;
  }
  if (worst === undefined) return undefined;
  return { value: m.layers[worst]!.teacherForced.update, where: layerName(m, worst), layer: worst };
}

const ofModel = (measured: Measured, text?: string): Measured => ({
  ...measured,
  ofModel: true,
  ...(text !== undefined && { where: text }),
});

const worstText = (m: Measurements, of: (t: Measurements['logits']['texts'][number]) => number): string | undefined => {
  const { texts } = m.logits;
  if (texts.length < 2) return undefined;
  return `worst text ${texts.reduce((a, b) => (of(b) > of(a) ? b : a)).name}`;
};

const requantize =
  'Quantize again with a better method (gptq instead of rtn, more calibration text), smaller groups (--group-size 32), or more bits for the layer named here';

/**
 * The gates, as data. How the defaults were found (docs/validation.md):
 * - `quantized` must pass an honest INT4 g128 of a model of 6 million parameters, which loses far more than one of 8
 *   billion, fail 3 bits there, and fail when one layer is broken in a model of any size. Measured on English, Chinese
 *   and WikiText (dense-6m GPTQ | dense-6m RTN | dense-32m RTN | dense-6m RTN 3 bits): KL 0.051 | 0.065 | 0.040 | 0.32,
 *   perplexity ratio 1.040 | 1.066 | 1.031 | 1.29, top-1 0.84 | 0.81 | 0.85 | 0.61, largest layer error 0.15 | 0.16 |
 *   0.16 | 0.34, worst heads 0.003 | 0.004 | 0.004 | 0.018. Published INT4 of 8B models has ratios of 1.03 to 1.10.
 *   The layer's error is against what the layer itself adds, and so about the same at every size; it finds the broken
 *   layer that a deep model makes up for. Whoever wants 98% of the quality asks for it: --max-ppl-ratio 1.02.
 * - `restructured` is what dense -> MoE conversion without training reaches at half of the FFN neurons, and some room.
 * - `exact` is for conversions between containers: rounding of the arithmetic is all that is allowed.
 */
export const gates: readonly Gate[] = [
  {
    id: 'maxTokenMismatch',
    name: 'token ids',
    metric: 'texts that the two tokenizers encode differently',
    direction: 'max',
    bounds: { exact: 0, quantized: 0, restructured: 0 },
    meaning: 'The same text must give both models the same token ids.',
    remedy:
      "Copy the reference's tokenizer files (tokenizer.json, tokenizer_config.json) beside the candidate's weights",
    measure: ({ tokenizer: t }) => {
      if (!t) return 'the candidate brings no tokenizer of its own';
      const first = t.mismatches[0];
      const where = first && `${first.text}, token ${first.at}: ${first.reference} against ${first.candidate}`;
      return { value: t.mismatches.length, ...(where !== undefined && { where }) };
    },
  },
  {
    id: 'maxBpeDropout',
    name: 'BPE dropout',
    metric: 'BPE dropout of the tokenizers',
    direction: 'max',
    bounds: { exact: 0, quantized: 0, restructured: 0 },
    meaning: 'With dropout the same text is encoded differently each time.',
    remedy: 'Set "dropout": null under "model" in tokenizer.json',
    measure: ({ tokenizer: t }) => {
      if (!t) return 'the candidate brings no tokenizer of its own';
      const { reference, candidate } = t.dropout;
      const where = candidate !== null ? 'tokenizer.json of the candidate' : 'tokenizer.json of the reference';
      const value = Math.max(reference ?? 0, candidate ?? 0);
      return { value, ...((reference ?? candidate) !== null && { where }) };
    },
  },
  {
    id: 'maxNonFinite',
    name: 'non-finite logits',
    metric: 'positions with non-finite logits in the candidate',
    direction: 'max',
    bounds: { exact: 0, quantized: 0, restructured: 0 },
    meaning: 'NaN or infinity: the weights are damaged, or overflow in a narrower type.',
    remedy:
      'Look for the tensor: deepseek-convert inspect CANDIDATE --tensors; fp16 overflows where bf16 does not (--dtype bf16)',
    measure: (m) => ofModel({ value: m.logits.nonFinite.candidate }),
  },
  {
    id: 'maxKl',
    name: 'KL, mean',
    metric: 'mean KL divergence of next-token distributions, nats',
    direction: 'max',
    bounds: { exact: 1e-5, quantized: 0.1, restructured: 0.5 },
    meaning: 'How far predictions moved, on average. The steadiest single measure of what a conversion costs.',
    remedy: requantize,
    measure: (m) =>
      ofModel(
        { value: m.logits.kl.mean, interval: m.logits.intervals.kl },
        worstText(m, (t) => t.kl.mean),
      ),
  },
  {
    id: 'maxKlP99',
    name: 'KL, 99th percentile',
    metric: '99th percentile of KL divergence, nats',
    direction: 'max',
    bounds: { exact: 1e-3, quantized: 1, restructured: 5 },
    meaning: 'The worst predictions in a hundred: outliers hide behind a good mean.',
    remedy: requantize,
    measure: (m) =>
      ofModel(
        { value: m.logits.kl.p99 },
        worstText(m, (t) => t.kl.p99),
      ),
  },
  {
    id: 'maxPplRatio',
    name: 'perplexity ratio',
    metric: 'perplexity, candidate / reference',
    direction: 'max',
    bounds: { exact: 1.0001, quantized: 1.1, restructured: 1.45 },
    meaning: 'How much worse the candidate predicts the texts. 1.02 keeps 98% of the quality.',
    remedy: requantize,
    measure: (m) =>
      ofModel(
        { value: m.logits.perplexity.ratio, interval: m.logits.intervals.ratio },
        worstText(m, (t) => t.perplexity.ratio),
      ),
  },
  {
    id: 'minTop1',
    name: 'same first choice',
    metric: 'share of positions where both models prefer the same token',
    direction: 'min',
    bounds: { exact: 0.999, quantized: 0.75, restructured: 0.6 },
    meaning: 'How often greedy decoding would take another way.',
    remedy: requantize,
    measure: (m) =>
      ofModel(
        { value: m.logits.top1 },
        worstText(m, (t) => -t.top1),
      ),
  },
  {
    id: 'maxLayerError',
    name: "worst layer's own error",
    metric: "largest error of a layer on the reference's input, against what the layer adds",
    direction: 'max',
    bounds: { exact: 1e-2, quantized: 0.3, restructured: 0.7 },
    meaning: 'One broken layer shows here however much the rest of a deep model makes up for it.',
    remedy:
      'Convert this layer with more bits or leave it out (--keep layers.N); if it should be intact, look at its tensors with inspect --tensors',
    measure: (m) => worstLayer(m) ?? 'the two models have no comparable layers',
  },
  {
    id: 'maxWeightError',
    name: 'weight that stands out',
    metric: 'relative error of the worst weight, of those that are 2.5 x the median of their kind, or all zero',
    direction: 'max',
    bounds: { exact: 1e-2, quantized: 0.35, restructured: 0.35 },
    meaning:
      'A matrix that stands out from its peers was damaged, or got another recipe. Methods that rescale all alike pass.',
    remedy: 'Convert this tensor again; compare both with inspect --tensors',
    measure: ({ weights: w }) => {
      if (!w || w.compared === 0) return 'no tensors of the same name and shape';
      const apart = w.worst.filter(({ error, peers, lost }) => lost === true || error >= 2.5 * peers);
      const worst = apart.toSorted((a, b) => b.error - a.error)[0];
      if (!worst) return { value: 0, where: 'none stands out' };
      return { value: worst.error, where: worst.name, ...(worst.layer !== null && { layer: worst.layer }) };
    },
  },
  {
    id: 'maxAttentionJs',
    name: 'attention, worst 5% of heads',
    metric: 'Jensen-Shannon divergence of attention patterns, worst 5% of heads, nats',
    direction: 'max',
    bounds: { exact: 1e-4, quantized: 0.05, restructured: 0.05 },
    meaning: "Whether each head still looks where it looked, on the reference's input, the first position left out.",
    remedy:
      'The q_proj and k_proj of this layer are off: give them more bits or leave them out; when their weights are intact, compare rope and norm settings in both config.json',
    measure: ({ attention: a }) => {
      const worst = a?.teacherForced.worst.heads[0];
      if (!a || !worst) return 'the attention heads of the two models do not correspond';
      return {
        value: a.teacherForced.worst.divergence,
        where: `layer ${worst.layer}, head ${worst.head} (${worst.divergence.toPrecision(3)})`,
        layer: worst.layer,
      };
    },
  },
  {
    id: 'maxHeadJs',
    name: 'attention, worst head',
    metric: 'Jensen-Shannon divergence of the worst single head, nats',
    direction: 'max',
    bounds: { exact: 1e-3, quantized: 0.15, restructured: 0.15 },
    meaning: 'One head that looks elsewhere, among hundreds that do not: heads out of order, a damaged slice.',
    remedy:
      'Look at the rows of this head in q_proj and k_proj, and at num_key_value_heads and head_dim in both config.json',
    measure: ({ attention: a }) => {
      const worst = a?.teacherForced.worst.heads[0];
      if (!worst) return 'the attention heads of the two models do not correspond';
      return { value: worst.divergence, where: `layer ${worst.layer}, head ${worst.head}`, layer: worst.layer };
    },
  },
  {
    id: 'maxLayer0Change',
    name: 'equal layer 0, equal patterns',
    metric: "largest difference of layer 0's queries and keys where its weights are equal",
    direction: 'max',
    bounds: { exact: 0, quantized: 0, restructured: 0 },
    meaning: 'Equal weights must give equal patterns, bit for bit. If not, the two config.json say different things.',
    remedy: 'Compare rope_theta, rope_parameters, rms_norm_eps, head_dim and the attention fields of both config.json',
    measure: ({ attention: a }) => {
      if (!a?.layer0) return 'no comparable attention in layer 0';
      if (!a.layer0.expected) return "the weights of layer 0's attention differ";
      return { value: a.layer0.difference, ...(a.layer0.difference > 0 && { where: 'layer 0', layer: 0 }) };
    },
  },
  {
    id: 'minRoutingAgreement',
    name: 'same experts chosen',
    metric: "share of the reference's experts that the candidate chooses too, worst layer",
    direction: 'min',
    bounds: { exact: 0.999, quantized: 0.85, restructured: 0.85 },
    meaning: 'On the same input the router must send a token to the same experts.',
    remedy: 'Keep the router in high precision; if it is, its rows or its bias are out of order with the experts',
    measure: ({ routing }) => {
      const layers = (routing?.layers ?? []).filter((l) => l.agreement !== undefined);
      if (layers.length === 0) return 'the two models do not both have the same experts';
      const worst = layers.reduce((a, b) => (b.agreement!.teacherForced < a.agreement!.teacherForced ? b : a));
      return { value: worst.agreement!.teacherForced, where: `layer ${worst.layer}`, layer: worst.layer };
    },
  },
  {
    id: 'maxDeadExperts',
    name: 'dead experts',
    metric: 'share of experts with less than a tenth of their even share of tokens',
    direction: 'max',
    bounds: { exact: null, quantized: null, restructured: 0.25 },
    meaning: 'Experts that are never chosen are parameters lost. Those that were dead in the reference do not count.',
    remedy: 'Convert with fewer experts, another --seed or more calibration text of the kind that is used',
    measure: ({ routing }) => {
      if (!routing) return 'the candidate has no experts';
      const newlyDead = routing.layers.map((l) => l.dead.filter((e) => !(l.reference?.dead ?? []).includes(e)).length);
      const worst = newlyDead.indexOf(Math.max(...newlyDead));
      const layer = routing.layers[worst]!.layer;
      return {
        value: newlyDead.reduce((a, b) => a + b, 0) / routing.experts,
        ...(newlyDead[worst]! > 0 && { where: `most in layer ${layer}: ${newlyDead[worst]!}`, layer }),
      };
    },
  },
  {
    id: 'maxLoadViolation',
    name: 'load violation (MaxVio)',
    metric: 'MaxVio: load of the busiest expert over the mean, minus 1, worst layer',
    direction: 'max',
    bounds: { exact: null, quantized: null, restructured: null },
    meaning: 'Uneven load costs speed where experts are spread over devices.',
    remedy: 'Convert with balanced routing or train the selection bias',
    measure: ({ routing }) => {
      if (!routing) return 'the candidate has no experts';
      const worst = routing.layers.reduce((a, b) => (b.maxVio > a.maxVio ? b : a));
      return { value: worst.maxVio, where: `layer ${worst.layer}`, layer: worst.layer };
    },
  },
  {
    id: 'minDistinctRatio',
    name: 'distinct-2 ratio',
    metric: 'distinct-2 of the generations, candidate / reference (upper end of its interval)',
    direction: 'min',
    bounds: { exact: 0.99, quantized: 0.9, restructured: 0.8 },
    meaning: 'Whether the candidate repeats itself more. Incoherent text is diverse too: read it beside KL.',
    remedy: 'Read the generations below; a damaged model loops. Then mend what the gates on logits and layers name',
    measure: ({ diversity: d }) =>
      d ? { value: d.distinctRatio.interval.high, interval: d.distinctRatio.interval } : 'no generations were made',
  },
  {
    id: 'maxRepIncrease',
    name: 'rep-4 increase',
    metric: 'increase of rep-4 in the generations (lower end of its interval)',
    direction: 'max',
    bounds: { exact: 0.01, quantized: 0.1, restructured: 0.2 },
    meaning: 'Share of 4-grams that were said before in the same generation: loops.',
    remedy: 'Read the generations below; a damaged model loops. Then mend what the gates on logits and layers name',
    measure: ({ diversity }) => {
      const row = diversity?.differences.find(({ metric }) => metric === 'rep-4');
      return row ? { value: row.interval.low, interval: row.interval } : 'no generations were made';
    },
  },
  {
    id: 'maxLateRepetition',
    name: 'late repetition',
    metric: 'increase of rep-4 in the last quarter of long generations (lower end of its interval)',
    direction: 'max',
    bounds: { exact: 0.01, quantized: 0.2, restructured: 0.3 },
    meaning: 'A damaged model may begin well and collapse into a loop after hundreds of tokens.',
    remedy: 'Read the quarters beside the reference; then mend what the gates on logits and layers name',
    measure: ({ stability: s }) => {
      if (!s) return 'no long generations were made (--long-tokens)';
      const where = s.collapsed.candidate > 0 && `${s.collapsed.candidate} of ${s.prompts} generations collapsed`;
      return { value: s.increase.interval.low, interval: s.increase.interval, ...(where && { where }) };
    },
  },
];

/** Bounds by gate id; null switches a gate off. */
export type GateBounds = Readonly<Partial<Record<string, number | null>>>;

/** Every gate's verdict. A value that is not finite fails. */
export function judge(m: Measurements, overrides: GateBounds): GateResult[] {
  return gates.map((gate): GateResult => {
    const { id, name, metric, direction, meaning } = gate;
    const override = overrides[id];
    const bound = override === undefined ? gate.bounds[m.profile] : override;
    const common = { id, name, metric, flag: gateFlag(id), direction, bound, meaning };
    const measured = gate.measure(m);
    if (typeof measured === 'string') return { ...common, status: 'skipped', value: null, reason: measured };
    const { value, ofModel: model, ...rest } = measured;
    const shown = { ...common, ...rest, value: Number.isFinite(value) ? value : null };
    if (bound === null) return { ...shown, status: 'off' };
    const holds = direction === 'max' ? value <= bound : value >= bound;
    if (holds) return { ...shown, status: 'pass' };
    const failed = { ...shown, status: 'fail', remedy: gate.remedy } as const;
    const worst = model ? worstLayer(m) : undefined;
    if (worst === undefined) return failed;
    const parts = [rest.where, `largest layer error in ${worst.where}`].filter((part) => part !== undefined);
    return { ...failed, where: parts.join('; '), layer: worst.layer };
  });
}
