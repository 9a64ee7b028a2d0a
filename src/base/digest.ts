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
const buffer = Buffer.allocUnsafeSlow(1 << 17); // stays in the core's cache
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

/** Running SHA-256 of files, beside the work that writes or reads them. */
export interface Digests {
  /** Hashes on to byte `to`; returns the CRC-32 of this part where it is asked for. */
  advance(path: string, to: number, crc?: boolean): Promise<number>;
  /** Hashes the rest of the file; returns the hex SHA-256 of all of it. */
  finish(path: string): Promise<string>;
  /** Forgets what was hashed of a file. */
  restart(path: string): Promise<void>;
  close(): Promise<void>;
}

/** Files by number; several advance at once, on threads of the native core. */
export interface NativeHasher {
  open(path: string): number;
  advance(file: number, to: number): Promise<void>;
  finish(file: number): Promise<string>;
  drop(file: number): void;
}

let native: (new () => NativeHasher) | undefined;

/** From now on files are hashed by the native core (backend/native.ts, where the machine has the instructions for it). */
export function useNativeHasher(hasher: new () => NativeHasher): void {
  native = hasher;
}

/** `crc`: whether parts need their CRC-32, which Node computes. */
export const openDigests = (crc = false): Digests =>
  native && !crc ? new NativeDigests(new native()) : new DigestWorker();

export class NativeDigests implements Digests {
  readonly #files = new Map<string, number>();

  constructor(readonly hasher: NativeHasher) {}

  async advance(path: string, to: number): Promise<number> {
    await this.#on(path, (file) => this.hasher.advance(file, to));
    return 0;
  }

  async finish(path: string): Promise<string> {
    const sha256 = await this.#on(path, (file) => this.hasher.finish(file));
    this.#drop(path);
    return sha256;
  }

  async restart(path: string): Promise<void> {
    this.#drop(path);
  }

  async close(): Promise<void> {
    for (const path of [...this.#files.keys()]) this.#drop(path);
  }

  async #on<T>(path: string, work: (file: number) => Promise<T>): Promise<T> {
    try {
      let file = this.#files.get(path);
      if (file === undefined) this.#files.set(path, (file = this.hasher.open(path)));
      return await work(file);
    } catch (error) {
      throw ioError(error, 'checksum', path);
    }
  }

  #drop(path: string): void {
    const file = this.#files.get(path);
    if (file !== undefined) this.hasher.drop(file);
    this.#files.delete(path);
  }
}

/** On a thread of its own, through Node. */
export class DigestWorker implements Digests {
  #worker: Worker | undefined;
  #next = 0;
  readonly #pending = new Map<
    number,
    { resolve: (value: never) => void; reject: (error: unknown) => void; path: string }
  >();

  advance(path: string, to: number, crc = false): Promise<number> {
    return this.#ask(path, { to, crc });
  }

  finish(path: string): Promise<string> {
    return this.#ask(path, { end: true });
  }

  async restart(path: string): Promise<void> {
    await this.#ask(path, { to: 0, restart: true });
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
