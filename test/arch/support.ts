import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
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
export function testEnv(): JobEnv {
  const device = openDevice({ kind: 'cpu', threads: 2, poison: true });
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

/** A folder of links: `config` from one case of fixtures/arch, weights from another. */
export function linkedCase(name: string, weightsOf: string): string {
  const folder = mkdtempSync(join(tmpdir(), 'arch-'));
  afterAll(() => rmSync(folder, { recursive: true }));
  mkdirSync(folder, { recursive: true });
  symlinkSync(fixture('arch', name, 'config.json'), join(folder, 'config.json'));
  symlinkSync(fixture('arch', weightsOf, 'model.safetensors'), join(folder, 'model.safetensors'));
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

export interface RawTensor {
  dtype: string;
  shape: number[];
  data: Uint8Array;
}

/** A copy of a case of fixtures/arch with its config and tensors changed. */
export function editedCase(
  name: string,
  edit: { config?: (config: Record<string, unknown>) => void; tensors?: (tensors: Map<string, RawTensor>) => void },
): string {
  const folder = mkdtempSync(join(tmpdir(), 'arch-'));
  afterAll(() => rmSync(folder, { recursive: true }));
  const config = JSON.parse(readFileSync(fixture('arch', name, 'config.json'), 'utf8')) as Record<string, unknown>;
  edit.config?.(config);
  writeFileSync(join(folder, 'config.json'), JSON.stringify(config));
  const file = readFileSync(fixture('arch', name, 'model.safetensors'));
  const start = 8 + Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString('utf8', 8, start)) as Record<
    string,
    { dtype: string; shape: number[]; data_offsets: [number, number] }
  >;
  const tensors = new Map<string, RawTensor>();
  for (const [key, value] of Object.entries(header)) {
    if (key === '__metadata__') continue;
    const [from, to] = value.data_offsets;
    tensors.set(key, { ...value, data: Uint8Array.from(file.subarray(start + from, start + to)) });
  }
  edit.tensors?.(tensors);
  const out: Record<string, unknown> = {};
  let at = 0;
  for (const [key, { dtype, shape, data }] of tensors) {
    out[key] = { dtype, shape, data_offsets: [at, (at += data.length)] };
  }
  const json = Buffer.from(JSON.stringify(out));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  writeFileSync(
    join(folder, 'model.safetensors'),
    Buffer.concat([length, json, ...[...tensors.values()].map((t) => t.data)]),
  );
  return folder;
}
