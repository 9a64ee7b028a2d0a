import { open, type FileHandle } from 'node:fs/promises';
import { ioError } from '../base/files.js';

/** Files opened for reading, once each. */
export class OpenFiles {
  readonly #files = new Map<string, Promise<FileHandle>>();

  get(path: string): Promise<FileHandle> {
    let file = this.#files.get(path);
    if (!file) {
      file = open(path, 'r').catch((error: unknown) => {
        throw ioError(error, 'open', path);
      });
      this.#files.set(path, file);
    }
    return file;
  }
  async close(): Promise<void> {
    const files = [...this.#files.values()];
    this.#files.clear();
    for (const file of files) await file.then((f) => f.close()).catch(() => undefined);
  }
}
