import { appendFileSync, existsSync, mkdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { z } from 'zod';
import type { Duel } from '../../src/validate/compare.js';
import type { ValidateReport } from '../../src/validate/report.js';
import { Damage, scaleBy, truncate } from '../validate/models.js';
import { cli, json, root, v1, workFolder } from './support.js';

vi.setConfig({ testTimeout: 240_000 });
const work = workFolder();
const small = ['--device', 'cpu', '--samples', '8', '--seq-len', '64', '--resamples', '200', '--progress', 'none'];
let damage: Damage;
let coarse: string;
let broken: string;
beforeAll(async () => {
  damage = await Damage.make();
  coarse = await damage.copy(v1, 'coarse', truncate);
  broken = await damage.copy(v1, 'broken', { 'model.layers.1.mlp.down_proj.weight': (bits) => bits.fill(0) });
});
afterAll(() => damage.remove());

describe('compare', () => {
  it('recommends what is better by more than chance, and says by which rule', async () => {
    const slight = await damage.copy(v1, 'slight', { 'model.layers.2.mlp.up_proj.weight': scaleBy(1.01) });
    const path = join(work, 'compare.json');
    const run = await cli(['compare', v1, coarse, slight, broken, ...small, '--report-json', path]);
    expect(run.code, run.stderr).toBe(0);
    expect(run.stdout).toContain(`Recommended: ${slight}, as small as ${coarse}, with a KL that is lower by more than`);
    expect(run.stdout).toContain('Rule: the smallest of those that pass every gate');
    expect(run.stdout).toMatch(/FAILED .*--max-layer-error/);
    const data = JSON.parse(readFileSync(path, 'utf8')) as { schema: string; pairs: Duel[]; reports: ValidateReport[] };
    expect(data.schema).toBe('deepseek-convert/comparison');
    expect(data.pairs.map(({ first, second, better }) => [first, second, better])).toEqual([[0, 1, 1], [0, 2, 0], [1, 2, 1]]); // prettier-ignore
    const [a, b] = data.reports.map(({ logits }) => logits.kl.mean);
    expect(data.pairs[0]!.kl.difference).toBeCloseTo(a! - b!, 5);
    // A real report, too, is what the published schema says.
    const schema = JSON.parse(readFileSync(join(root, 'schemas/validate-report.v1.schema.json'), 'utf8')) as never;
    for (const report of data.reports)
      expect(z.fromJSONSchema(schema).safeParse(report).error?.issues ?? []).toEqual([]);
  });

  it('exits with 3 where none passes, and refuses a single candidate', async () => {
    const none = await cli(['compare', v1, broken, broken, ...small, '--json']);
    expect(none.code).toBe(3);
    expect(json(none)).toMatchObject({ ok: false, recommendation: { candidate: null } });
    const one = await cli(['compare', v1, coarse, ...small]);
    expect(one.code).toBe(2);
    expect(one.stderr).toContain('deepseek-convert validate');
  });
});

describe('validate --reporter', () => {
  const args = ['--samples', '2', '--seq-len', '64', '--generations', '0', '--device', 'cpu', '--progress', 'none'];
  it('github: annotations, and the exit code', async () => {
    const run = await cli(['validate', v1, broken, ...args, '--reporter', 'github']);
    expect(run.code).toBe(3);
    const lines = run.stdout.trim().split('\n');
    expect(lines.every((line) => line.startsWith('::error title='))).toBe(true);
    expect(run.stdout).toContain("::error title=worst layer's own error::");
  });
  it('junit: nothing but XML on stdout', async () => {
    const run = await cli(['validate', v1, v1, ...args, '--reporter', 'junit']);
    expect(run.code).toBe(0);
    expect(run.stdout).toMatch(/^<\?xml [^]*<\/testsuites>\n$/);
    expect(run.stdout).toContain('failures="0"');
  });
});

describe('history', () => {
  const folder = join(work, 'made');
  const common = ['--device', 'cpu', '--progress', 'none'];

  it('tells what was made of what', async () => {
    mkdirSync(folder);
    expect((await cli(['history', folder])).stdout).toContain('No conversions');
    const [plain, int4] = [join(folder, 'plain'), join(folder, 'int4')];
    expect((await cli(['convert', v1, '-o', plain, ...common])).code).toBe(0);
    const quantized = await cli(['quantize', plain, '-o', int4, '--method', 'rtn', '--validate-samples', '2', ...common]); // prettier-ignore
    expect(quantized.code, quantized.stderr).toBe(0);
    const { records } = json<{ records: Record<string, never>[] }>(await cli(['history', folder, '--json']));
    expect(records).toMatchObject([
      { command: 'convert', out: 'plain', parent: null, validation: null },
      { command: 'quantize', out: 'int4', parent: records[0]!.id, validation: { passed: true } },
    ]);
    expect(records[1]).toMatchObject({ recipe: { recipe: { method: 'rtn', bits: 4 } } });
    // The hashes are those of the files.
    const provenance = JSON.parse(readFileSync(join(int4, 'deepseek-convert.json'), 'utf8')) as { outputs: object[] };
    expect(records[1]!.outputs).toEqual(provenance.outputs);

    const html = join(work, 'history.html');
    const table = await cli(['history', folder, '--html', html]);
    expect(table.stdout).toMatch(/convert +plain[^]*quantize +int4 .* passed/);
    const page = readFileSync(html, 'utf8');
    for (const part of ['Content-Security-Policy', 'int4', String(records[0]!.id)]) expect(page).toContain(part);
  });

  it('tells of several outputs of one job one by one; the card of each says what it holds', async () => {
    const out = join(folder, 'several');
    const run = await cli(['quantize', v1, '-o', out, '--method', 'rtn', '--group-size', '32', '--format', 'gptq,gguf', '--no-validate', ...common]); // prettier-ignore
    expect(run.code, run.stderr).toBe(0);
    expect(run.stderr).not.toContain('not in the history');
    const { records } = json<{ records: object[] }>(await cli(['history', folder, '--json']));
    expect(records.slice(2)).toMatchObject([{ out: 'several/gptq' }, { out: 'several/gguf' }]);
    const card = (format: string) => readFileSync(join(out, format, 'README.md'), 'utf8');
    expect(card('gptq')).toContain('int4 g32 symmetric');
    expect(card('gguf')).not.toContain('int4 g32 symmetric');
    expect(card('gguf')).toMatch(/q4_k/i);
  });

  it('a failed gate leaves no line; a damaged one is named', async () => {
    const run = await cli(['quantize', v1, '-o', join(folder, 'bad'), '--method', 'rtn', '--validate-samples', '2', '--max-kl', '1e-9', ...common]); // prettier-ignore
    expect(run.code).toBe(3);
    expect(existsSync(join(folder, 'bad'))).toBe(false);
    expect(json<{ records: object[] }>(await cli(['history', folder, '--json'])).records).toHaveLength(4);
    appendFileSync(join(folder, 'deepseek-convert-history.jsonl'), '{"half": \n');
    const read = await cli(['history', folder]);
    expect(read.code).toBe(1);
    expect(read.stderr).toMatch(/history\.jsonl, line 5/);
  });
});
