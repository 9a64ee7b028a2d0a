/** Texts in a file: where each begins and ends, bytes. */
export type Places = Int32Array;

/**
 * Reads headers and indexes in the form that libraries write without objects of them (native/scan_addon.cc). Null where
 * anything is otherwise, also a name that is there twice: then the file is read as any JSON.
 */
export interface Scanner {
  /** The tensors of a safetensors header, from the quote before the first name on. */
  header(bytes: Uint8Array, at: number): ScannedHeader | null;
  /** The `weight_map` of an index, from behind its brace on. */
  index(bytes: Uint8Array, at: number): ScannedIndex | null;
  /** Whether each of the other names is among the names, and none of them there twice. */
  holdsEach(bytes: Uint8Array, names: Places, otherBytes: Uint8Array, others: Places): boolean;
}

export interface ScannedHeader {
  readonly names: Places;
  /** `:{"dtype":"BF16","shape":[2,3]`; one may be there more than once. */
  readonly forms: Places;
  /** Of each tensor. */
  readonly formOf: Int32Array;
  /** data_offsets, two for each tensor. */
  readonly offsets: Float64Array;
}

export interface ScannedIndex {
  readonly files: Places;
  /** Of the tensors that stand for each file. */
  readonly names: readonly Places[];
  /** Behind the closing brace. */
  readonly end: number;
}

let find: (() => Scanner | undefined) | undefined;
let found: Scanner | undefined;

/** From now on `load` gives the scanner, when the first large file is read. */
export function provideScanner(load: () => Scanner | undefined): void {
  [find, found] = [load, undefined];
}

export function scanner(): Scanner | undefined {
  if (find) [found, find] = [find(), undefined];
  return found;
}
