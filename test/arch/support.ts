import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { crc32 } from 'node:zlib';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll } from 'vitest';
import type { JobEnv } from '../../src/backend/env.js';
import { openDevice } from '../../src/backend/load.js';
import { silentLog } from '../../src/base/log.js';
import { readSafetensors } from '../../src/formats/safetensors.js';
import { OpenFile } from '../../src/formats/source.js';

const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
export const fixture = (...path: string[]): string => join(root, 'fixtures', ...path);
export const shared = (...path: string[]): string => join(dirname(root), 'shared', ...path);

/** A trained model: from fixtures/ where it is there, else from ../shared; undefined (with a note) without both. */
export function trainedModel(name: string, file = ''): string | undefined {
  const path = [fixture(name, file), shared('models', name, file)].find((p) => existsSync(p));
  if (!path) console.warn(`skipped: ../shared/models/${name} is not there`);
  return path;
}

/** A poisoned CPU device, closed when the file's tests are over. */
export function testEnv(threads = 2): JobEnv {
  const device = openDevice({ kind: 'cpu', threads, poison: true });
  afterAll(() => device.close());
  return { device, log: silentLog, signal: new AbortController().signal };
}

export interface Expected {
  readonly shape: readonly number[];
  readonly f32: Float32Array;
  readonly i32: Int32Array;
}

/** Expected values, made by a script of fixtures/. */
export function expected(path: string): Record<string, Expected> {
  using file = new OpenFile(path);
  return Object.fromEntries(
    readSafetensors(file).tensors.map(({ name, shape, span }) => {
      const bytes = new Uint8Array(file.read(span.offset, span.bytes, name)).slice();
      const values: Expected = {
        shape,
        get f32() {
          return new Float32Array(bytes.buffer);
        },
        get i32() {
          return new Int32Array(bytes.buffer);
        },
      };
      return [name, values];
    }),
  );
}

/** Values of a tensor by the formula of fixtures/arch/make_arch.py: bf16, or i64 below `experts`. */
function formula(name: string, shape: readonly number[], experts: number): RawTensor {
  const start = crc32(name);
  const offset = shape.length === 1 && name.endsWith('.weight') ? 1 : 0;
  const count = shape.reduce((a, b) => a * b, 1);
  const table = name.endsWith('.tid2eid') ? new BigInt64Array(count) : undefined;
  const values = new Float32Array(count);
  for (let i = 0; i < values.length; i++) {
    let x = (Math.imul(i, 0x9e3779b1) + start) | 0;
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b);
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35);
    x ^= x >>> 16;
    if (table) table[i] = BigInt((x >>> 8) % experts);
    values[i] = Math.fround(Math.fround((x >>> 8) / 2 ** 24 - 0.5) * Math.fround(0.7)) + offset;
  }
  const bits = new Uint32Array(values.buffer);
  const halves = Uint16Array.from(bits, (u) => (u + 0x7fff + ((u >>> 16) & 1)) >>> 16);
  const own = { shape: [...shape], data: new Uint8Array((table ?? halves).buffer) };
  return { dtype: table ? 'I64' : 'BF16', ...own };
}

export interface RawTensor {
  dtype: string;
  shape: number[];
  data: Uint8Array;
}

/** A case of fixtures/arch as a checkpoint folder, with its config and tensors changed where asked. */
export function archCase(
  name: string,
  edit: {
    config?: (config: Record<string, unknown>) => void;
    tensors?: (tensors: Map<string, RawTensor>) => void;
  } = {},
): string {
  const folder = mkdtempSync(join(tmpdir(), 'arch-'));
  afterAll(() => rmSync(folder, { recursive: true }));
  const json = (file: string) => JSON.parse(readFileSync(file, 'utf8')) as Record<string, unknown>;
  const config = json(fixture('arch', name, 'config.json'));
  edit.config?.(config);
  writeFileSync(join(folder, 'config.json'), JSON.stringify(config));
  const own = fixture('arch', name, 'tensors.json');
  const shapes = json(existsSync(own) ? own : fixture('arch', name.split('-')[0]!, 'tensors.json')) as Record<
    string,
    number[]
  >;
  const tensors = new Map<string, RawTensor>();
  for (const [key, shape] of Object.entries(shapes))
    tensors.set(key, formula(key, shape, Number(config.n_routed_experts)));
  edit.tensors?.(tensors);
  const header: Record<string, unknown> = {};
  let at = 0;
  for (const [key, { dtype, shape, data }] of tensors) {
    header[key] = { dtype, shape, data_offsets: [at, (at += data.length)] };
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  const data = [...tensors.values()].map((t) => t.data);
  writeFileSync(join(folder, 'model.safetensors'), Buffer.concat([length, text, ...data]));
  return folder;
}

/** max |a - b| / max |b|. */
export function relativeError(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) throw new Error(`lengths differ: ${a.length} and ${b.length}`);
  let difference = 0;
  let largest = 0;
  for (let i = 0; i < b.length; i++) {
    const d = Math.abs(a[i]! - b[i]!);
    if (!(d <= difference)) difference = d; // NaN counts
    largest = Math.max(largest, Math.abs(b[i]!));
  }
  return difference / largest;
}
