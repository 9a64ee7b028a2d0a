import type { DType } from '../base/dtype.js';

export const reportSchema = 'deepseek-convert/validate-report';
/** Raised when a field changes its meaning or goes away; new fields don't raise it. */
export const reportVersion = 1;

/**
 * Everything that a validation found. It fits in JSON, has no times and no machine in it, and is the same object for
 * the same inputs on the same kind of device. Divergences are in nats; layers and heads count from 0.
 */
export interface ValidateReport {
  readonly schema: typeof reportSchema;
  readonly version: typeof reportVersion;
  /** Every gate that could be measured holds. */
  readonly passed: boolean;
  /** Which column of default bounds was used. */
  readonly profile: Profile;
  readonly reference: ModelFacts;
  readonly candidate: ModelFacts;
  readonly settings: ReportSettings;
  readonly gates: readonly GateResult[];
  /** What the numbers point at, one sentence each, the most telling first. */
  readonly diagnosis: readonly string[];
  readonly logits: LogitsResult;
  readonly layers: readonly LayerResult[];
  readonly attention?: AttentionResult;
  readonly routing?: RoutingResult;
  readonly weights?: WeightsResult;
  readonly tokenizer?: TokenizerResult;
  readonly diversity?: DiversityResult;
  readonly stability?: StabilityResult;
  /** Parts that were left out, and why. */
  readonly skipped: readonly { readonly part: string; readonly reason: string }[];
  readonly notes: readonly string[];
}

/** exact: the same weights in another container; quantized: the same structure; restructured: dense -> MoE. */
export type Profile = 'exact' | 'quantized' | 'restructured';

export interface ModelFacts {
  readonly path: string;
  readonly format: string;
  readonly modelType: string;
  /** Of the logical tensors, whatever they are stored as. */
  readonly parameters: number;
  readonly storedBytes: number;
  readonly layers: number;
  readonly heads: number;
  readonly hidden: number;
  readonly vocab: number;
  readonly experts?: { readonly total: number; readonly active: number; readonly shared: number };
  /** `compressed-tensors`, `gptq` ... where the checkpoint says so. */
  readonly quantization?: string;
  /** SHA-256 over headers and config. */
  readonly fingerprint: string;
}

export interface ReportSettings {
  readonly tool: string;
  readonly device: string;
  readonly dtype: DType;
  readonly seed: number;
  readonly samples: number;
  readonly seqLen: number;
  readonly tokens: number;
  readonly texts: readonly {
    readonly name: string;
    readonly sha256: string;
    readonly tokens: number;
    readonly windows: number;
  }[];
  readonly bootstrap: number;
}

export interface Interval {
  readonly low: number;
  readonly high: number;
}

export type GateStatus = 'pass' | 'fail' | 'off' | 'skipped';

export interface GateResult {
  readonly id: string;
  readonly name: string;
  /** What is measured, in words. */
  readonly metric: string;
  readonly flag: string;
  readonly direction: 'max' | 'min';
  readonly status: GateStatus;
  readonly value: number | null;
  readonly bound: number | null;
  /** 95%. */
  readonly interval?: Interval;
  /** The worst layer, head, linear, text: `layer 2, head 3`. */
  readonly where?: string;
  readonly layer?: number;
  readonly meaning: string;
  /** Failed gates only. */
  readonly remedy?: string;
  /** Why it was skipped. */
  readonly reason?: string;
}

/** Of the candidate's next-token distributions against the reference's: KL(reference || candidate). */
export interface LogitsNumbers {
  readonly tokens: number;
  readonly kl: { readonly mean: number; readonly median: number; readonly p99: number; readonly max: number };
  /** Share of positions where both models prefer the same token. */
  readonly top1: number;
  readonly perplexity: { readonly reference: number; readonly candidate: number; readonly ratio: number };
}

export interface LogitsResult extends LogitsNumbers {
  /** 95%, paired bootstrap over windows. */
  readonly intervals: { readonly kl: Interval; readonly ratio: Interval };
  /** Positions where only one of the two has the text's own token on top. */
  readonly flips: { readonly rightToWrong: number; readonly wrongToRight: number };
  readonly texts: readonly (LogitsNumbers & { readonly name: string })[];
  /** Positions whose logits are not finite; left out of all other numbers. */
  readonly nonFinite: { readonly reference: number; readonly candidate: number };
  /** counts[i] positions with edges[i] <= KL < edges[i + 1]; the first and the last take what lies beyond. */
  readonly histogram: { readonly edges: readonly number[]; readonly counts: readonly number[] };
  /** By window, in the order of the texts: what comparisons of several candidates are drawn from. */
  readonly windows: readonly WindowNumbers[];
  /** The positions with the largest divergence. */
  readonly worst: readonly WorstToken[];
}

export interface WindowNumbers {
  /** Index of the text. */
  readonly text: number;
  readonly tokens: number;
  /** Means over the window's tokens, nats. */
  readonly kl: number;
  readonly loss: { readonly reference: number; readonly candidate: number };
}

export interface WorstToken {
  readonly text: string;
  readonly window: number;
  readonly position: number;
  readonly kl: number;
  readonly before: string;
  readonly actual: string;
  readonly reference: string;
  readonly candidate: string;
}

export interface LayerError {
  /** |y' - y| / |y| over all tokens, y the reference block's output. */
  readonly output: number;
  /** Mean over tokens of |y' - y| / |y - x|: against what the block adds, so that a large residual hides nothing. */
  readonly update: number;
}

export interface LayerResult {
  readonly index: number;
  readonly name: string;
  readonly kind: 'dense' | 'moe' | 'other';
  /** The candidate's block fed the reference's input. */
  readonly teacherForced: LayerError;
  /** The candidate's block fed its own stream. */
  readonly freeRunning: LayerError;
}

/** [layer][head]; null for a layer without comparable attention. */
export type HeadMap = readonly (readonly number[] | null)[];

export interface HeadNumbers {
  readonly divergence: number;
  readonly cosine: number;
  readonly overlap: number;
}

export interface AttentionMode {
  /** Jensen-Shannon divergence of the attention rows without key 0, nats, mean over queries. */
  readonly divergence: HeadMap;
  readonly cosine: HeadMap;
  /** Share of the eight strongest keys that both have. */
  readonly overlap: HeadMap;
  readonly mean: HeadNumbers;
  /** The 5% of heads with the largest divergence: their means, and the heads. */
  readonly worst: HeadNumbers & {
    readonly heads: readonly (HeadNumbers & { readonly layer: number; readonly head: number })[];
  };
}

export interface AttentionResult {
  readonly teacherForced: AttentionMode;
  readonly freeRunning: AttentionMode;
  /** Where layer 0's attention weights are equal its patterns must be, bit for bit: largest difference of q and k. */
  readonly layer0: { readonly expected: boolean; readonly difference: number } | null;
}

export interface RoutingLayer {
  readonly layer: number;
  readonly experts: number;
  readonly active: number;
  /** Share of the routed slots that each expert of the candidate got; sums to 1. */
  readonly load: readonly number[];
  /** max / mean - 1. */
  readonly maxVio: number;
  /** 1: all equal, 0: one expert has all. */
  readonly entropy: number;
  /** Experts with less than 0.1 / E of the slots. */
  readonly dead: readonly number[];
  /** The same of the reference, where it has experts too. */
  readonly reference?: {
    readonly load: readonly number[];
    readonly maxVio: number;
    readonly entropy: number;
    readonly dead: readonly number[];
  };
  /** Share of the reference's chosen experts that the candidate chose as well. */
  readonly agreement?: { readonly teacherForced: number; readonly freeRunning: number };
}

export interface RoutingResult {
  readonly layers: readonly RoutingLayer[];
  readonly mean: { readonly maxVio: number; readonly entropy: number; readonly agreement?: number };
  readonly dead: number;
  readonly experts: number;
}

export interface WeightError {
  readonly name: string;
  /** |W' - W| / |W| (Frobenius). */
  readonly error: number;
  /** The median error of tensors of the same kind (same last name). */
  readonly peers: number;
  readonly layer: number | null;
  /** All zero in the candidate, and not in the reference. */
  readonly lost?: true;
}

export interface WeightsResult {
  readonly compared: number;
  /** Bit-identical ones among them. */
  readonly identical: number;
  /** Tensors of one side without a partner of the same name and shape. */
  readonly unmatched: { readonly reference: number; readonly candidate: number };
  /** By kind (`self_attn.q_proj`), over layers. */
  readonly kinds: readonly {
    readonly kind: string;
    readonly count: number;
    readonly mean: number;
    readonly max: number;
  }[];
  /** The largest against their peers, at most 40. */
  readonly worst: readonly WeightError[];
}

export interface TokenizerResult {
  /** Tokens encoded with the reference's tokenizer. */
  readonly tokens: number;
  /** Texts whose ids differ, with the first difference. */
  readonly mismatches: readonly {
    readonly text: string;
    readonly at: number;
    readonly reference: string;
    readonly candidate: string;
  }[];
  readonly vocabulary: { readonly reference: number; readonly candidate: number };
  /** BPE dropout: anything but null makes encoding random. */
  readonly dropout: { readonly reference: number | null; readonly candidate: number | null };
}

/** Per-response values are means over responses; corpus values pool all n-grams. n-grams are of token ids. */
export interface DiversityNumbers {
  readonly distinct: { readonly perResponse: readonly number[]; readonly corpus: readonly number[] };
  /** Expectation-adjusted distinct unigrams of the corpus. */
  readonly ead: number;
  /** rep-2, rep-3, rep-4: mean over responses of 1 - distinct-n. */
  readonly repetition: readonly number[];
  /** Mean BLEU-4 of each response against all others; 1: all alike. */
  readonly selfBleu: number;
  readonly meanLength: number;
  readonly empty: number;
}

export interface Difference {
  readonly metric: string;
  readonly reference: number;
  readonly candidate: number;
  readonly difference: number;
  /** 95%, paired bootstrap over prompts. */
  readonly interval: Interval;
}

export interface DiversityResult {
  readonly reference: DiversityNumbers;
  readonly candidate: DiversityNumbers;
  /** candidate - reference. */
  readonly differences: readonly Difference[];
  /** Distinct-2 of the corpus, candidate over reference, with its interval. */
  readonly distinctRatio: { readonly value: number; readonly interval: Interval };
  readonly settings: {
    readonly prompts: number;
    readonly newTokens: number;
    readonly temperature: number;
    readonly seed: number;
  };
  readonly pairs: readonly { readonly prompt: string; readonly reference: string; readonly candidate: string }[];
}

/** Long generations that no end token ends. */
export interface StabilityResult {
  readonly prompts: number;
  readonly newTokens: number;
  readonly temperature: number;
  /** rep-4 within each quarter, mean over generations. */
  readonly quarters: { readonly reference: readonly number[]; readonly candidate: readonly number[] };
  /** Generations whose last quarter has a rep-4 above 0.8. */
  readonly collapsed: { readonly reference: number; readonly candidate: number };
  /** rep-4 of the last quarter, candidate - reference; 95%, paired bootstrap over prompts. */
  readonly increase: { readonly value: number; readonly interval: Interval };
}
