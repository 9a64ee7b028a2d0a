import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { cli, json, listing, workFolder } from './support.js';

const folder = workFolder();

describe('demo', () => {
  it('runs convert, moe, quantize and validate on a model of its own, and leaves nothing behind', async () => {
    const temporary = join(folder, 'tmp');
    mkdirSync(temporary);
    const finished = await cli(['demo', '--device', 'cpu', '--json'], { env: { TMPDIR: temporary } });
    expect(finished.stderr).toContain('$ deepseek-convert quantize');
    const { steps, validation } = json<{
      steps: { command: string; ok: boolean; bytes?: number }[];
      validation: { report: { passed: boolean; reference: { experts: object }; candidate: { quantization: string } } };
    }>(finished);
    expect(finished.code).toBe(0);
    expect(steps.map(({ command, ok }) => [command, ok])).toEqual([
      ['convert', true],
      ['moe', true],
      ['quantize', true],
      ['validate', true],
    ]);
    expect(validation.report.passed).toBe(true);
    expect(validation.report.reference.experts).toMatchObject({ total: 8 });
    // INT4 is less than half of bf16, though embedding and head stay.
    expect(steps[2]!.bytes).toBeLessThan(steps[1]!.bytes! / 2);
    expect(listing(temporary)).toEqual([]);
  }, 120_000);
  it('stops when it is interrupted, and takes its models with it', async () => {
    const temporary = join(folder, 'stopped');
    mkdirSync(temporary);
    const { code, stderr } = await cli(['demo', '--device', 'cpu'], {
      env: { TMPDIR: temporary },
      started: (child) => child.stderr!.once('data', () => child.kill('SIGINT')),
    });
    expect([code, stderr]).toEqual([75, expect.stringContaining('To go on: deepseek-convert demo --device cpu')]);
    expect(listing(temporary)).toEqual([]);
  }, 120_000);
});
