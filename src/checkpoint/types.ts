import type { ByteSource } from '../base/bytes.js';
import type { DType, FloatDType } from '../base/dtype.js';
import type { Json } from '../base/job.js';
import type { Encoding, TensorEntry } from '../formats/types.js';

export type { Arrangement, AssembledPart, Encoding, GgmlType, TensorEntry } from '../formats/types.js';

export type ContainerFormat = 'safetensors' | 'torch' | 'gguf' | 'onnx' | 'deepseek-native';

/** A checkpoint opened for reading: headers only, data on demand. */
export interface Checkpoint {
  readonly path: string;
  readonly format: ContainerFormat;
  /** config.json as it stands (or the equivalent rebuilt from GGUF metadata). */
  readonly config: Readonly<Record<string, unknown>>;
  readonly configPath: string | undefined;
  readonly tensors: ReadonlyMap<string, TensorEntry>;
  /** Files with weights, in order. */
  readonly files: readonly string[];
  /** Tokenizer and generation files beside the weights, carried along by writers. */
  readonly companions: readonly string[];
  /** Tokenizer files that the checkpoint carries inside (GGUF), rebuilt: content by name. */
  readonly extraFiles: ReadonlyMap<string, string>;
  /** Tensors that the file holds wider than the model did (GGUF: norms are f32), and what they were: lossless to undo. */
  readonly widened: ReadonlyMap<string, FloatDType>;
  /** What was ignored or assumed, one sentence each (optimizer state, nested dicts ...). */
  readonly notes: readonly string[];
  /** SHA-256 over headers and config: identifies the input without reading the weights. */
  readonly fingerprint: string;
  /** Refuses input files that were changed since they were opened: to be called when all has been read. */
  assertUnchanged(): Promise<void>;
  close(): Promise<void>;
}

/** One tensor of an output, known before anything is computed. */
export interface PlannedTensor {
  readonly name: string;
  readonly shape: readonly number[];
  readonly dtype: DType;
  /** Stored otherwise than as plain `dtype` elements: GGML blocks, or opaque bytes carried through. */
  readonly encoding?: Encoding;
  /** The file that it goes to (DeepSeek's native shards); otherwise shards are filled in order. Its key is `planKey`. */
  readonly file?: string;
  /** PyTorch only: an earlier planned tensor whose storage this one shares (tied embeddings); it is not written. */
  readonly tiedTo?: string;
}

/** A complete output, read back and verified, that has no name yet. */
export interface StagedOutput {
  /** What it can be opened as: a folder, or the lone file with its config beside it. */
  readonly path: string;
  /** The work folder, which is kept when the output is refused. */
  readonly workFolder: string;
}

/**
 * Decides whether a staged output gets its name: throws to refuse it. What it returns stands in the provenance file as
 * `validation`; it may not depend on time or place, so that equal jobs write equal bytes.
 */
export type Accept = (staged: StagedOutput) => Promise<Json>;

/** What `CheckpointWriter.write` calls a planned tensor: names repeat where each tensor says its file. */
export const planKey = ({ name, file }: PlannedTensor): string => (file === undefined ? name : `${file}/${name}`);

/** Takes planned tensors, in any order. */
export interface TensorSink {
  /** Puts one planned tensor's bytes where they belong; size and name are checked against the plan. */
  write(name: string, data: ByteSource): Promise<void>;
  /** Forces everything written so far to disk. After a crash, what was flushed is there. */
  flush(): Promise<void>;
  /** A block's tensors must be flushed before the next one's are written. */
  readonly blockByBlock?: boolean;
}

/** Writes planned tensors into temporary files; nothing has its final name before `finish`. */
export interface CheckpointWriter extends TensorSink {
  /** The job's work folder. */
  readonly partFolder: string;
  /** Whether a tensor is on disk already, from an earlier run too. */
  has(name: string): boolean;
  /** The file that a tensor goes to. */
  fileOf(name: string): string;
  /**
   * Every planned tensor written: index, config, companions, provenance; verifies the output with our own reader;
   * then the rename. `report` goes into the provenance file (per-layer errors ...).
   */
  finish(report?: Readonly<Record<string, Json>>): Promise<void>;
  /** Ends this run's hold of the files without finishing; what was flushed stays. */
  close(): Promise<void>;
}
