import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { z } from 'zod';
import { readJobs } from '../../../src/batch/file.js';
import { jobFileSchema } from '../../../src/batch/schema.js';
import { argumentsOf } from '../../../src/batch/state.js';
import { jobCommands } from '../../../src/commands/batch.js';
import { commands } from '../../../src/commands/index.js';

const root = new URL('../../../', import.meta.url);
const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const known = await jobCommands(commands);
let files = 0;

async function read(yaml: string, environment: Record<string, string> = {}) {
  const path = join(folder, `jobs${files++}.yaml`);
  writeFileSync(path, yaml);
  const jobs = await readJobs(path, { commands: known, environment, outputRoot: folder, workFolder: join(folder, 'work') }); // prettier-ignore
  return new Map(jobs.map((job) => [job.name, job]));
}
const refusal = async (yaml: string, environment?: Record<string, string>): Promise<string> =>
  read(yaml, environment).then(
    () => 'accepted',
    (error: Error & { kind?: string }) => `${error.kind}: ${error.message}`,
  );

const out = `${folder}/out`;
const matrix = `
defaults: { out: '${out}/\${name}', convert: { dtype: f16 }, quantize: { group-size: 64 } }
matrix:
  models: { a: models/a, b: { input: models/b, config: b.json } }
  recipes:
    half: { command: convert }
    int4: { command: quantize, bits: 3, needs: '\${model}-half' }
    check: { command: validate, reference: '\${input}', candidate: '${out}/\${model}-int4' }
  exclude: [{ model: b, recipe: check }]
`;

describe('a file of jobs', () => {
  it('gives each model each recipe, with defaults where a command has them', async () => {
    const jobs = await read(matrix);
    expect([...jobs.keys()]).toEqual(['a-half', 'a-int4', 'a-check', 'b-half', 'b-int4']);
    expect(argumentsOf(jobs.get('b-int4')!).sort()).toEqual(
      ['quantize', '--bits=3', '--config=b.json', '--group-size=64', '--input=models/b', `--out=${out}/b-int4`].sort(),
    );
    expect(argumentsOf(jobs.get('a-check')!)).not.toContain('--dtype=bf16');
    expect(jobs.get('a-half')!.values.dtype).toBe('f16');
    expect(jobs.get('a-int4')!.values.groupSize).toBe(64);
  });

  it('knows that who names an output needs its job, and sorts by that', async () => {
    const jobs = await read(`
jobs:
  - { name: second, command: convert, input: ${out}/first/model.safetensors, out: ${out}/second }
  - { name: first, command: convert, input: m, out: ${out}/first }`);
    expect([...jobs.keys()]).toEqual(['first', 'second']);
    expect(jobs.get('second')!.needs).toEqual(['first']);
  });

  it('fills placeholders from the environment, and nothing twice', async () => {
    const yaml = `jobs: [{ name: x, command: convert, input: '\${ROOT}/m', out: '${out}/\${KIND:-plain}', config: '$\${ROOT}' }]`; // prettier-ignore
    const job = (await read(yaml, { ROOT: '${HOME}' })).get('x')!;
    expect(job.values).toMatchObject({ input: '${HOME}/m', config: '${ROOT}', out: `${out}/plain` });
    expect(await refusal(yaml)).toMatch(/usage: \$\{ROOT\} has no value \(jobs\[0\].*input.*\)[^]*\$\{ROOT:-default\}/);
    expect(await refusal(yaml.replace('${KIND:-plain}', '${KI ND}'), { ROOT: 'x' })).toContain(
      'placeholder is not understood',
    );
  });

  it('lists every problem before anything starts, with the nearest names', async () => {
    const text = await refusal(`
defaults: { group-sise: 64 }
jobs:
  - { name: a, command: quantise, input: m, out: ${out}/a }
  - { name: b, command: quantize, input: m, out: ${out}/b, bitz: 4 }
  - { name: c, command: quantize, input: m, out: ${out}/c, bits: 5 }
  - { name: d, command: quantize, input: m }
  - { name: ../e, command: inspect, input: m }
  - { name: f, command: convert, input: m, out: ${out}/f, restart: true }`);
    expect(text).toMatch(/^usage: .* has 7 problems; nothing was started/);
    expect(text).toMatch(/Unknown command "quantise"[^]*Did you mean quantize\?/);
    expect(text).toMatch(/quantize has no option "bitz" \(bitz in b, jobs\[1\][^]*Did you mean bits\?/);
    expect(text).toMatch(/bits[^]*expected 2, 3, 4 or 8, got "5"/);
    expect(text).toContain('-o (--out) <path> is missing');
    expect(text).toContain('A job needs another name');
    expect(text).toContain('"restart"');
    expect(text).toMatch(/Unknown option "group-sise"[^]*Did you mean group-size\?/);
  });

  it.each([
    ['jobz: []', /Unknown key "jobz"[^]*Did you mean jobs\?/],
    ['jobs: []', /The file has no jobs/],
    ['version: 2\njobs: [{ name: a, command: inspect, input: m }]', /version/],
    ['jobs: [{ name: a, command: inspect, input: m }, { name: a, command: inspect, input: n }]', /Two jobs are named a/],
    ['jobs: [{ name: a, command: inspect, input: m, needs: [bb] }, { name: b, command: inspect, input: n }]', /needs "bb", which is no job[^]*Did you mean b\?/],
    ['jobs: [{ name: a, command: inspect, input: m, needs: [b] }, { name: b, command: inspect, input: n, needs: a }]', /circle .*got a -> b -> a/],
    ['jobs: [{ name: a, command: inspect, input: m, retries: -1 }]', /retries/],
    ['jobs: [{ name: a, command: batch, input: m }]', /Unknown command "batch"/],
    [`jobs: [{ name: a, command: convert, input: m, out: ${out} }, { name: b, command: convert, input: m, out: ${out}/b }]`, /a and b write to one place/],
    ['jobs: [{ name: a, command: convert, input: m, out: /elsewhere/b }]', /write outside the folder for outputs \(\/elsewhere\/b\)/],
    [`jobs: [{ name: a, command: validate, reference: m, candidate: n, report: ${out}/../../r.html }]`, /write outside the folder/],
    [`jobs: [{ name: a, command: convert, input: m, out: ${folder}/work/logs }]`, /into the work folder/],
    ['matrix: { models: { a: m }, recipes: { r: { command: inspect } }, exclude: [{ model: aa }] }', /Unknown key "aa"[^]*Did you mean a\?/],
  ])('refuses %s', async (yaml, expected) => {
    expect(await refusal(yaml)).toMatch(expected);
  }); // prettier-ignore

  it('does not follow a link out of the folder for outputs', async () => {
    mkdirSync(out, { recursive: true });
    symlinkSync('/', join(out, 'link'));
    expect(await refusal(`jobs: [{ name: a, command: convert, input: m, out: ${out}/link/tmp/x }]`)).toContain(
      'outside',
    );
  });
});

describe('schemas/batch.v1.schema.json', () => {
  const published = JSON.parse(readFileSync(new URL('schemas/batch.v1.schema.json', root), 'utf8')) as object;
  const schema = z.fromJSONSchema(published as Parameters<typeof z.fromJSONSchema>[0]);
  const accepts = (yaml: string): boolean => schema.safeParse(parse(yaml)).success;

  it('is what the option tables say (npm run docs)', () => {
    expect(published).toEqual(JSON.parse(JSON.stringify(jobFileSchema(known))));
  });

  it.each([
    matrix,
    readFileSync(new URL('fixtures/batch/jobs.yaml', root), 'utf8'),
    readFileSync(new URL('fixtures/batch/slurm.yaml', root), 'utf8'),
    'jobs: [{ name: a, command: quantize, input: m, out: o, group-size: 64, max-kl: 0.1, gates: { max-kl: off }, keep: [x] }]',
    "jobs: [{ name: a, command: '${COMMAND}', input: m, bits: '${BITS}' }]",
  ])('accepts %s', (yaml) => expect(accepts(yaml)).toBe(true));

  it.each([
    'jobs: [{ name: a, command: quantize, input: m, out: o, bitz: 4 }]',
    'jobs: [{ name: a, command: inspect, input: m, bits: 4 }]',
    'jobs: [{ name: a, command: quantize, input: m, out: o, method: gptk }]',
    'jobs: [{ name: a, command: quantize, input: m, out: o, samples: 0 }]',
    'jobs: [{ name: a, command: quantize, input: m, out: o, samples: many }]',
    'jobs: [{ name: ../a, command: inspect, input: m }]',
    'jobs: [{ command: inspect, input: m }]',
    'jobz: []',
    'defaults: { group-sise: 64 }',
    'defaults: { slurm: { partitoin: gpu } }',
    'jobs: [{ name: a, command: inspect, input: m, slurm: { partition: "gpu --wrap=id" } }]',
  ])('refuses %s', (yaml) => expect(accepts(yaml)).toBe(false));
});
