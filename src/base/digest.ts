import { Worker } from 'node:worker_threads';
import { ioError } from './files.js';

/**
 * The worker, as source: it must run from TypeScript sources (tests) and from the built package alike.
 * Each file has one running SHA-256; `advance` reads on from where the last one ended.
 */
const source = `
const { parentPort } = require('node:worker_threads');
const { createHash } = require('node:crypto');
const { crc32 } = require('node:zlib');
const fs = require('node:fs');
const files = new Map();
const buffer = Buffer.allocUnsafeSlow(1 << 20);
parentPort.on('message', ({ id, path, to, crc, end, restart }) => {
  try {
    if (restart && files.has(path)) { fs.closeSync(files.get(path).fd); files.delete(path); }
    let file = files.get(path);
    if (file === undefined) {
      file = { fd: fs.openSync(path, 'r'), at: 0, hash: createHash('sha256') };
      files.set(path, file);
    }
    if (end) to = fs.fstatSync(file.fd).size;
    let sum = 0;
    while (file.at < to) {
      const count = fs.readSync(file.fd, buffer, 0, Math.min(buffer.length, to - file.at), file.at);
      if (count === 0) throw new Error('the file ends at byte ' + file.at + ', before byte ' + to);
      const part = buffer.subarray(0, count);
      file.hash.update(part);
      if (crc) sum = crc32(part, sum);
      file.at += count;
    }
    let result = sum;
    if (end) {
      result = file.hash.digest('hex');
      fs.closeSync(file.fd);
      files.delete(path);
    }
    parentPort.postMessage({ id, result });
  } catch (error) {
    parentPort.postMessage({ id, message: error.message, code: error.code });
  }
});
`;

interface Answer {
  readonly id: number;
  readonly result?: number | string;
  readonly message?: string;
  readonly code?: string;
}

/** SHA-256 (and CRC-32) of files on a thread of its own, beside the work that writes or reads them. */
export class DigestWorker {
  #worker: Worker | undefined;
  #next = 0;
  readonly #pending = new Map<
    number,
    { resolve: (value: never) => void; reject: (error: unknown) => void; path: string }
  >();

  /** Hashes on to byte `to`; returns the CRC-32 of this part. */
  advance(path: string, to: number, crc = false): Promise<number> {
    return this.#ask(path, { to, crc });
  }

  /** Hashes the rest of the file; returns the hex SHA-256 of all of it. */
  finish(path: string): Promise<string> {
    return this.#ask(path, { end: true });
  }

  /** Forgets what was hashed of a file. */
  restart(path: string): Promise<number> {
    return this.#ask(path, { to: 0, restart: true });
  }

  async close(): Promise<void> {
    await this.#worker?.terminate();
    this.#worker = undefined;
  }

  #ask<T>(path: string, request: object): Promise<T> {
    this.#worker ??= this.#start();
    const id = this.#next++;
    return new Promise<T>((resolve, reject) => {
      this.#pending.set(id, { resolve, reject, path });
      this.#worker!.ref();
      this.#worker!.postMessage({ id, path, ...request });
    });
  }

  #start(): Worker {
    const worker = new Worker(source, { eval: true });
    worker.on('message', ({ id, result, message, code }: Answer) => {
      const { resolve, reject, path } = this.#pending.get(id)!;
      this.#pending.delete(id);
      // An idle worker must not keep the process alive.
      if (this.#pending.size === 0) worker.unref();
      if (message === undefined) resolve(result as never);
      else reject(ioError(Object.assign(new Error(message), { code }), 'checksum', path));
    });
    worker.on('error', (error) => {
      for (const { reject, path } of this.#pending.values()) reject(ioError(error, 'checksum', path));
      this.#pending.clear();
    });
    return worker;
  }
}
