import { existsSync, mkdirSync, rmSync, symlinkSync } from 'node:fs';
import { mkdtempSync } from 'node:fs';
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
