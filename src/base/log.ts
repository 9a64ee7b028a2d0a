/** Where jobs say what they do. Commands decide how it is shown (stderr; TTY, plain or JSON lines). */
export interface Log {
  debug(text: string): void;
  info(text: string): void;
  warn(text: string): void;
  /** One finished step: `quantize 3/32`, with what matters of it (error, bits, seconds). */
  progress(step: ProgressStep): void;
}

export interface ProgressStep {
  readonly stage: string;
  readonly done: number;
  readonly total: number;
  /** Human-readable: `rel. error 0.0123, 4.13 bits`. */
  readonly detail?: string;
  /**
   * The same for machines. Every stage has the same names for: `block`, where the step is a block of the model;
   * `tokens` that went through the model, or through that block of it; `seconds` that the step took.
   */
  readonly data?: Readonly<Record<string, unknown>>;
}

export const silentLog: Log = { debug() {}, info() {}, warn() {}, progress() {} };
