import type { Job, Json } from '../base/job.js';
import type { GgufValue } from '../formats/gguf.js';
import type { OnnxGraph } from '../formats/onnx-writer.js';
import type { OutputFormat } from './layout.js';
import type { Accept, PlannedTensor } from './types.js';

export interface Provenance {
  readonly tool: { readonly name: string; readonly version: string };
  /** What was done, as the command knows it: the frozen options. */
  readonly recipe: Json;
  /** Files that were read; their SHA-256 is computed beside the work. */
  readonly inputs: readonly string[];
}

export interface WriterOptions {
  /** The work folder and the output's name; its `overwrite` allows replacing an existing output. */
  readonly job: Job;
  readonly format: OutputFormat;
  /** One of several outputs of a job: its folder within the job's output. All get their name at once, by `deliverParts`. */
  readonly part?: string | undefined;
  /** In the order of the layers: shards are filled in this order. */
  readonly tensors: readonly PlannedTensor[];
  /**
   * Tensors come in about this order, as blocks are done: safetensors files hold them in it, so that checksums follow.
   * Default: the order of the reference's writer, whose bytes a conversion then equals.
   */
  readonly inPlanOrder?: boolean;
  /** Bytes (default 5 GB). Only for a folder: a file output is one file. */
  readonly shardSize?: number;
  /** config.json of the output. */
  readonly config: Readonly<Record<string, unknown>>;
  /** Files copied along (tokenizer ...): `Checkpoint.companions`. */
  readonly companions?: readonly string[];
  /** More files by name, e.g. README.md; they win over companions of the same name. */
  readonly extraFiles?: ReadonlyMap<string, string | Uint8Array>;
  /** Metadata of GGUF files, which carry config and tokenizer inside; such outputs get no files beside them. */
  readonly gguf?: ReadonlyMap<string, GgufValue>;
  /** Graph of an ONNX model, whose weights the tensors are. */
  readonly onnx?: OnnxGraph;
  /** Header metadata of safetensors files (default `format: pt`, which transformers wants). */
  readonly metadata?: Readonly<Record<string, string>>;
  readonly provenance: Provenance;
  /** README.md once all is known: `validation` is what `accept` returned. Takes the place of the one in `extraFiles`. */
  readonly card?: (validation: Json | undefined) => string;
  /** Absent: every output that reads back as planned gets its name. */
  readonly accept?: Accept | undefined;
}
