import { execFile } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterAll } from 'vitest';
export { convert, ourLogits } from '../support/models.js';

const here = fileURLToPath(new URL('.', import.meta.url));

/** A folder for one test file, gone afterwards. */
export function workFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'interop-'));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Runs a script of this folder; its stdout is JSON. */
export async function python<T>(script: string, ...args: string[]): Promise<T> {
  const command = process.env.INTEROP_PYTHON ?? 'python3';
  const { stdout } = await promisify(execFile)(command, [join(here, script), ...args], { maxBuffer: 2 ** 28 });
  return JSON.parse(stdout) as T;
}

/** onnx.checker on folders; returns the operators of each. */
export async function checkOnnx(...folders: string[]): Promise<string[][]> {
  const checked = await python<{ operators: string[] }[]>('check_onnx.py', ...folders);
  return checked.map(({ operators }) => operators);
}

/** Tokens that look random and are the same every time. */
export const someTokens = (count: number, vocab: number, seed = 1): Int32Array => {
  let state = seed >>> 0;
  return Int32Array.from({ length: count }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * vocab);
  });
};

/** max |a - b| / max |b|. */
export function relativeError(a: ArrayLike<number>, b: ArrayLike<number>): number {
  if (a.length !== b.length) throw new Error(`lengths differ: ${a.length} and ${b.length}`);
  let [difference, largest] = [0, 0];
  for (let i = 0; i < b.length; i++) {
    const d = Math.abs(a[i]! - b[i]!);
    if (!(d <= difference)) difference = d; // NaN counts
    largest = Math.max(largest, Math.abs(b[i]!));
  }
  return difference / largest;
}

/** Text that nothing here is calibrated on: calibration/held-out. */
export function heldOut(): string {
  const lines = readFileSync(join(here, '../../calibration/held-out/held-out.jsonl'), 'utf8').trim().split('\n');
  return lines.map((line) => (JSON.parse(line) as { text: string }).text).join('\n\n');
}
