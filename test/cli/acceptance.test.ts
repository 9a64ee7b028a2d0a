import { cpSync, existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it, vi } from 'vitest';
import type { ValidateReport } from '../../src/validate/report.js';
import { cli, fixture, json, v1, workFolder } from './support.js';

vi.setConfig({ testTimeout: 240_000 });
const folder = workFolder();
const out = (name: string): string => join(folder, name);
const cpu = ['--device', 'cpu', '--progress', 'none', '--validate-samples', '2'];
const quick = ['--calibration', fixture('samples.jsonl'), '--samples', '4', '--seq-len', '32', ...cpu];
const quickMoe = ['--samples', '8', '--seq-len', '128', '--rounds', '1', '--router-steps', '2', ...cpu];

interface Validation {
  readonly passed: boolean;
  readonly profile: string;
  readonly kl: { readonly mean: number };
  readonly gates: readonly { id: string; status: string; value: number; bound: number | null }[];
}
const provenance = (path: string) => JSON.parse(readFileSync(path, 'utf8')) as { validation?: Validation };
const gate = (validation: Validation | undefined, id: string) => validation?.gates.find((g) => g.id === id);

describe('quantize validates what it made', () => {
  it('a good output says in its provenance what was measured', async () => {
    const run = await cli(['quantize', v1, '-o', out('good'), ...quick]);
    expect(run.code, run.stderr).toBe(0);
    expect(run.stdout).toMatch(/validation: passed \d+ gates; KL 0\.\d+, perplexity x 1\.\d+/);
    const { validation } = provenance(join(out('good'), 'deepseek-convert.json'));
    expect(validation).toMatchObject({ passed: true, profile: 'quantized' });
    expect(validation!.kl.mean).toBeGreaterThan(0.001);
    expect(gate(validation, 'maxKl')).toMatchObject({ status: 'pass', value: validation!.kl.mean, bound: 0.1 });
    // The same numbers as validate finds of the output.
    const again = await cli(['validate', v1, out('good'), '--samples', '2', '--generations', '0', '--device', 'cpu', '--json']); // prettier-ignore
    expect(json<{ report: ValidateReport }>(again).report.logits.kl).toEqual(validation!.kl);
  });

  it('a failed gate refuses the name and keeps everything; --keep-failed gives it; a wider bound as well', async () => {
    const job = join(folder, 'job.yaml');
    writeFileSync(job, 'quantize:\n  gates:\n    max-kl: 1e-6\n');
    const args = ['quantize', v1, '-o', out('bad'), ...quick, '--config-file', job];
    const refused = await cli(args);
    expect(refused.code).toBe(3);
    for (const part of [
      '--max-kl',
      'at most 0.000001',
      'did not get its name',
      join(out('bad.part'), 'output'),
      '--keep-failed',
    ])
      expect(refused.stderr).toContain(part);
    expect(existsSync(out('bad'))).toBe(false);
    expect(readdirSync(out('bad.part'))).toEqual(expect.arrayContaining(['output', 'validation.html', 'validation.json'])); // prettier-ignore
    const report = JSON.parse(readFileSync(join(out('bad.part'), 'validation.json'), 'utf8')) as ValidateReport;
    expect(report).toMatchObject({ passed: false, candidate: { path: out('bad') } });

    const kept = await cli([...args, '--keep-failed', '--json']);
    expect(kept.code).toBe(3);
    expect(json(kept)).toMatchObject({ ok: false, error: { kind: 'gate' }, validation: { passed: false } });
    expect(existsSync(out('bad.part'))).toBe(false);
    expect(provenance(join(out('bad'), 'deepseek-convert.json')).validation).toMatchObject({ passed: false });
    const weights = (name: string) => readFileSync(join(out(name), 'model.safetensors'));
    expect(weights('bad').equals(weights('good'))).toBe(true);

    const second = args.with(3, out('wide'));
    expect((await cli(second)).code).toBe(3);
    const wide = await cli([...second, '--max-kl', '0.5', '--progress', 'plain']);
    expect(wide.code, wide.stderr).toBe(0);
    expect(wide.stderr).toContain('Going on after block 4 of 4');
    expect(weights('wide').equals(weights('good'))).toBe(true);
  });

  it('--no-validate leaves it out, and says so', async () => {
    const run = await cli(['quantize', v1, '-o', out('unseen'), ...quick, '--max-kl', '1e-9', '--no-validate']);
    expect(run.code).toBe(0);
    expect(run.stdout).toContain('not validated: switched off (--no-validate)');
    expect(provenance(join(out('unseen'), 'deepseek-convert.json'))).not.toHaveProperty('validation');
    const both = await cli(['quantize', v1, '-o', out('both'), ...quick, '--no-validate', '--keep-failed']);
    expect(both.code).toBe(2);
    expect(existsSync(out('both'))).toBe(false);
  });

  it('a model without tokenizer is written with a warning', async () => {
    const bare = out('bare-in');
    mkdirSync(bare);
    for (const name of ['v1.0_checkpoint.bin', 'v1.0_checkpoint.config.json']) cpSync(fixture(`v1.0/${name}`), join(bare, name)); // prettier-ignore
    const args = ['quantize', join(bare, 'v1.0_checkpoint.bin'), '-o', out('bare'), '--method', 'rtn', ...cpu];
    const run = await cli([...args, '--progress', 'plain']);
    expect(run.code, run.stderr).toBe(0);
    expect(run.stderr).toContain('The output is not validated: the model has no tokenizer.json');
    expect(provenance(join(out('bare'), 'deepseek-convert.json')).validation).toMatchObject({ skipped: expect.stringContaining("tokenizer.json") as string }); // prettier-ignore
  });
});

describe('moe validates what it made', () => {
  it('the documents’ form: what the default number of experts loses is shown, not judged', async () => {
    const form = ['--input-model', v1, '--output-model', out('v2.bin'), '--target-arch', 'moe', '--expert-num', '8'];
    const run = await cli([...form, ...quickMoe]);
    expect(run.code, run.stderr).toBe(0);
    expect(run.stdout).toContain('--active 2 refits for that number and judges it');
    const { validation } = provenance(out('v2.deepseek-convert.json'));
    expect(validation).toMatchObject({ passed: true, profile: 'restructured' });
    expect(gate(validation, 'maxKl')).toMatchObject({ status: 'off', bound: null });
    expect(gate(validation, 'maxKl')!.value).toBeGreaterThan(0.5);
    expect(gate(validation, 'maxAttentionJs')).toMatchObject({ status: 'pass' });
  });

  it('a number of experts that was asked for is judged, and refused where it loses too much', async () => {
    const args = ['moe', v1, '-o', out('two'), '--experts', '8', '--active', '2', ...quickMoe];
    const run = await cli([...args, '--json']);
    expect(run.code).toBe(3);
    expect(json(run)).toMatchObject({
      ok: false,
      error: { kind: 'gate', message: expect.stringContaining('--max-kl') as string },
    });
    expect(existsSync(out('two'))).toBe(false);
    const kept = await cli([...args, '--keep-failed']);
    expect(kept.code).toBe(3);
    expect(existsSync(join(out('two'), 'model.safetensors'))).toBe(true);
    expect(kept.stdout).toMatch(/validation: FAILED .*--max-kl/);
  });
});
