import type { Json } from '../base/job.js';

/** What the report says of one linear. */
export interface LinearReport {
  readonly name: string;
  readonly scheme: string;
  readonly bitsPerWeight: number;
  /** tr((W-Q) H (W-Q)') / tr(W H W'); without statistics the same with H = I. */
  readonly error: number;
  /** The same for plain rounding. */
  readonly plainError: number;
  readonly method: 'gptq' | 'rtn' | 'autoround';
  /** Share of the mean diagonal that was added to H; 0: none needed. */
  readonly damp: number;
  /** Calibration tokens that reached it; 0: quantized without any. */
  readonly tokens: number;
  /** Output rows on which plain rounding was better and is used. */
  readonly fallbackRows: number;
  /** Input channels that no calibration token excited. */
  readonly deadChannels: number;
  readonly seconds: number;
  /** Hash of what the stored codes stand for. */
  readonly probe: string;
  /** The same for targets that stand for other values, by name. */
  readonly probes?: Readonly<Record<string, string>>;
  /** Anything out of the ordinary, one sentence. */
  readonly note?: string;
}

export interface ExpertCoverage {
  readonly layer: number;
  readonly experts: number;
  /** Tokens of each expert. */
  readonly tokens: readonly number[];
  /** Experts whose Hessian was drawn towards the layer's. */
  readonly starved: number;
  /** Experts that were calibrated on no token. */
  readonly uncovered: number;
  /** `--calibrate-all-experts`: the counts are the router's, but every expert was calibrated on all tokens. */
  readonly calibratedOnAll?: boolean;
}

/** What learned rounding did to a block's output: its mean squared error over the mean square, on windows that judge. */
export interface RoundingReport {
  readonly before: number;
  readonly after: number;
  /** The step that is kept, of how many; 0: none was better than the start. */
  readonly best: number;
  /** Linears, or sets that share an input, that stay as the last step left them although the whole block does not. */
  readonly parts: number;
  readonly steps: number;
}

export interface BlockReport {
  readonly block: number;
  readonly linears: readonly LinearReport[];
  readonly coverage?: ExpertCoverage;
  readonly rounding?: RoundingReport;
  readonly stages: Readonly<Record<string, number>>;
}

export const toJson = (report: BlockReport): Json => JSON.parse(JSON.stringify(report)) as Json;
export const fromJson = (data: Json): BlockReport => data as unknown as BlockReport;

/** Mean over linears of the relative error, each weighted alike. */
export const meanError = (linears: readonly LinearReport[], key: 'error' | 'plainError' = 'error'): number =>
  linears.length === 0 ? 0 : linears.reduce((sum, linear) => sum + linear[key], 0) / linears.length;
