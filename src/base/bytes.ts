/**
 * Something that can put its bytes into a file: a tensor on a device, bytes in memory, a span of another file.
 * Writers take these, so that tensor data never has to pass through the JS heap.
 */
export interface ByteSource {
  readonly byteLength: number;
  /** Writes all bytes to `fd` at `position` (bytes). */
  writeTo(fd: number, position: number): Promise<void>;
}

/** Where a tensor's raw bytes lie. */
export interface FileSpan {
  readonly path: string;
  /** Byte offset in the file. */
  readonly offset: number;
  readonly bytes: number;
}
