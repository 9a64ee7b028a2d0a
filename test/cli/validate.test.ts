import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ValidateReport } from '../../src/validate/report.js';
import { Damage } from '../validate/models.js';
import { cli, fixture, v1, workFolder } from './support.js';

const work = workFolder();
const small = ['--device', 'cpu', '--samples', '2', '--seq-len', '64', '--generations', '0', '--resamples', '100'];
let damage: Damage;
let broken: string;
beforeAll(async () => {
  damage = await Damage.make();
  broken = await damage.copy(v1, 'broken', { 'model.layers.1.mlp.down_proj.weight': (bits) => bits.fill(0) });
});
afterAll(() => damage.remove());

describe('validate', () => {
  it('a model against itself passes, with the texts that come with the tool', async () => {
    const { code, stdout } = await cli(['validate', v1, v1, ...small, '--profile', 'exact']);
    expect(code).toBe(0);
    expect(stdout).toContain('PASSED');
    expect(stdout).toContain('KL 0 (95%: 0 to 0)');
    expect(stdout).not.toContain('calibration texts themselves');
  });

  it('a damaged copy exits with 3, names the layer, and leaves all reports', async () => {
    const paths = ['html', 'json', 'md'].map((kind) => join(work, `report.${kind}`)) as [string, string, string];
    const flags = ['--report', paths[0], '--report-json', paths[1], '--report-md', paths[2]];
    const { code, stdout, stderr } = await cli(['validate', v1, broken, ...small, ...flags]);
    expect(code).toBe(3);
    expect(stdout).toMatch(/FAIL\s+worst layer's own error\s+0\.\d+\s+<= 0\.3\s+layer 1 \(model\.layers\.1\)/);
    for (const part of ['--max-layer-error', 'model.layers.1.mlp.down_proj.weight', 'more bits'])
      expect(stderr).toContain(part);
    expect(readFileSync(paths[0], 'utf8')).toContain('<!doctype html>');
    const report = JSON.parse(readFileSync(paths[1], 'utf8')) as ValidateReport;
    expect(report).toMatchObject({ schema: 'deepseek-convert/validate-report', version: 1, passed: false });
    expect(report.gates.find(({ id }) => id === 'maxLayerError')).toMatchObject({ status: 'fail', layer: 1 });
    expect(readFileSync(paths[2], 'utf8')).toContain('**FAILED**');
  });

  it('bounds from flags, the environment and a job file decide; off switches a gate off', async () => {
    const off = ['--max-kl', 'off', '--max-kl-p99', 'off', '--max-ppl-ratio', '100', '--min-top1', '0'];
    const more = ['--max-layer-error', 'off', '--json'];
    const env = { DEEPSEEK_CONVERT_MAX_WEIGHT_ERROR: 'off' };
    const passed = await cli(['validate', v1, broken, ...small, ...off, ...more], { env });
    expect(passed.code).toBe(0);
    const { report } = JSON.parse(passed.stdout) as { report: ValidateReport };
    expect(report.gates.find(({ id }) => id === 'maxKl')).toMatchObject({ status: 'off', bound: null });
    expect(report.gates.find(({ id }) => id === 'maxPplRatio')).toMatchObject({ status: 'pass', bound: 100 });

    const strict = await cli([
      'validate',
      fixture('moe-6m'),
      fixture('moe-6m'),
      ...small,
      '--min-top1',
      '1.5',
      '--json',
    ]);
    expect(strict.code).toBe(3);
    const answer = JSON.parse(strict.stdout) as { ok: boolean; report: ValidateReport; error: { message: string } };
    expect(answer.ok).toBe(false);
    expect(answer.report.gates.flatMap((g) => (g.status === 'fail' ? [g.flag] : []))).toEqual(['--min-top1']);
  });

  it.each([
    [['--max-kl', 'low'], 2, /a number, or off/],
    [['--text', 'nowhere.txt'], 1, /nowhere\.txt/],
    [['--profile', 'quantised'], 2, /quantized/],
  ])('refuses %j', async (flags, status, message) => {
    const { code, stderr } = await cli(['validate', v1, v1, ...small, ...flags]);
    expect(code).toBe(status);
    expect(stderr).toMatch(message);
  });

  it('an unreadable candidate is bad input, and no report appears', async () => {
    const path = join(work, 'none.html');
    const { code, stderr } = await cli(['validate', v1, join(work, 'missing'), ...small, '--report', path]);
    expect(code).toBe(1);
    expect(stderr).toContain('missing');
    expect(existsSync(path)).toBe(false);
  });
});
