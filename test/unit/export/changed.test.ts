import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  rmSync,
  truncateSync,
  utimesSync,
  cpSync,
  statSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { planConversion } from '../../../src/export/convert-plan.js';
import { runConversion } from '../../../src/export/convert.js';
import { archCase, testEnv } from '../../arch/support.js';
import { refusal } from '../../support/refusal.js';

const env = testEnv();
let folder: string;
beforeEach(() => (folder = mkdtempSync(join(tmpdir(), 'changed-'))));
afterEach(() => rmSync(folder, { recursive: true }));

const rest = { overwrite: false, restart: false, ioBudget: 2 ** 28, allowSaturation: false, resumeHint: '' } as const;

/** The refusal of a conversion whose input `change` happens to once its headers are read. */
async function refused(dtype: 'f32' | undefined, change: (file: string) => void) {
  const [input, out] = [join(folder, 'in'), join(folder, 'out')];
  mkdirSync(input);
  cpSync(archCase('llama'), input, { recursive: true });
  const plan = await planConversion({ input, format: 'safetensors', dtype });
  const file = plan.checkpoint.files[0]!;
  try {
    change(file);
    const run = { input, out, format: 'safetensors', dtype, shardSize: 1e9, recipe: {}, ...rest } as const;
    const error = await refusal(runConversion(plan, run, env));
    expect(error.exitCode).toBe(1);
    expect(error.message).toContain(file);
    expect(existsSync(out)).toBe(false);
    expect(readdirSync(folder)).toEqual(['in']);
    return error.message;
  } finally {
    await plan.checkpoint.close();
  }
}

describe('convert refuses an input that is', () => {
  it.each(['f32', undefined] as const)('written to while it is read (to %s)', async (dtype) => {
    const message = await refused(dtype, (file) => utimesSync(file, new Date(), new Date(Date.now() + 5000)));
    expect(message).toMatch(/changed while it was read/);
  });

  it.each(['f32', undefined] as const)('truncated while it is read (to %s)', async (dtype) => {
    const message = await refused(dtype, (file) => truncateSync(file, statSync(file).size - 100));
    expect(message).toMatch(/ended before the tensor did.*got \d+ bytes/s);
  });
});
