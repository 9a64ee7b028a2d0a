import { execFile } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { afterAll } from 'vitest';
import type { JobEnv } from '../../src/backend/env.js';
import { openModel } from '../../src/arch/open.js';
import { ResidentModel } from '../../src/arch/resident.js';
import { planConversion, type ConvertOptions } from '../../src/export/convert-plan.js';
import { runConversion } from '../../src/export/convert.js';
import { Scope } from '../../src/tensor/tensor.js';

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

/** What `convert` does. */
export async function convert(options: ConvertOptions, out: string, env: JobEnv): Promise<void> {
  const plan = await planConversion(options);
  try {
    const run = { ...options, out, overwrite: false, restart: false, shardSize: 5e9, ioBudget: 64e6 };
    await runConversion(plan, { ...run, allowSaturation: false, recipe: {}, resumeHint: '' }, env);
  } finally {
    await plan.close();
  }
}

/** Our own logits f32 [B S, V] for tokens [B, S]. */
export async function ourLogits(path: string, env: JobEnv, tokens: Int32Array, batch = 1): Promise<Float32Array> {
  const open = await openModel(path);
  try {
    using resident = await ResidentModel.load(open, env, 'f32');
    using scope = new Scope(env.device);
    return await resident.logits(scope, resident.hidden(scope, tokens, batch)).float32();
  } finally {
    await open.close();
  }
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
