import { mkdirSync, writeFileSync, cpSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { cli, json, shell, v1, fixture, workFolder } from './support.js';

const folder = workFolder();
interface Failure {
  ok: boolean;
  error: { kind: string; exitCode: number; message: string; hint?: string };
}

describe('without a command', () => {
  it('no arguments show three commands that fit an empty folder', async () => {
    const empty = join(folder, 'empty');
    mkdirSync(empty);
    const { code, stdout, stderr } = await cli([], { cwd: empty });
    expect([code, stderr]).toEqual([0, '']);
    expect(stdout.match(/^ {2}deepseek-convert /gm)).toHaveLength(3);
    expect(stdout).toContain('No model in this folder');
  });
  it('no arguments show commands for the model at hand, which can be run as they stand', async () => {
    const here = join(folder, 'models');
    mkdirSync(here);
    cpSync(v1, join(here, 'my model.bin'));
    cpSync(fixture('v1.0/v1.0_checkpoint.config.json'), join(here, 'my model.config.json'));
    const { stdout } = await cli([], { cwd: here });
    const lines = stdout.match(/^ {2}deepseek-convert .*?(?= {2}|$)/gm)!.map((line) => line.trim());
    expect(lines).toEqual([
      `deepseek-convert inspect 'my model.bin'`,
      `deepseek-convert moe 'my model.bin' -o 'my model-moe' --experts 8 --active 2`,
      `deepseek-convert quantize 'my model.bin' -o 'my model-int4'`,
    ]);
    expect((await shell(lines[0]!, { cwd: here })).code).toBe(0);
  });
  it('no arguments show how to go on with what was interrupted, what to do with a file of jobs, with a GGUF file', async () => {
    const suggested = async (here: string) => {
      const { stdout } = await cli([], { cwd: here });
      expect(stdout.split('\n').every((line) => line.length <= 80 || line.startsWith('  deepseek-convert '))).toBe(
        true,
      );
      return stdout.match(/^ {2}deepseek-convert .*?(?= {2}|$)/gm)!.map((line) => line.trim());
    };
    const place = (name: string, file: string, content = '') => {
      mkdirSync(join(folder, name, dirname(file)), { recursive: true });
      writeFileSync(join(folder, name, file), content);
      return join(folder, name);
    };
    expect((await suggested(place('gguf', 'm.gguf'))).at(-1)).toBe(
      'deepseek-convert convert m.gguf -o m --format safetensors',
    );
    expect((await suggested(place('many', 'a.yaml', 'version: 1\njobs: []\n')))[0]).toBe(
      'deepseek-convert batch a.yaml --dry-run',
    );
    const begun = { arguments: ['quantize', 'a b', '-o', 'c'], folder: join(folder, 'part') };
    const part = place('part', 'c.part/job.json', JSON.stringify({ version: 1, fingerprint: {}, begun }));
    expect((await suggested(part))[0]).toBe("deepseek-convert quantize 'a b' -o c");
  });
  it('--help lists every command and the exit codes', async () => {
    const { code, stdout } = await cli(['--help']);
    expect(code).toBe(0);
    for (const name of ['inspect', 'convert', 'moe', 'quantize', 'validate', 'generate', 'score', 'doctor']) {
      expect(stdout).toMatch(new RegExp(`^ {2}${name} +\\S`, 'm'));
    }
    expect(stdout).toContain('75 interrupted');
    expect(stdout.split('\n').filter((line) => line.length > 80)).toEqual([]);
  });
  it('--version is the version', async () => {
    expect((await cli(['--version'])).stdout).toMatch(/^\d+\.\d+\.\d+\n$/);
  });
  it('`help command` and `command --help` say the same, with examples and defaults', async () => {
    const [a, b] = await Promise.all([cli(['help', 'inspect']), cli(['inspect', '--help'])]);
    expect(a).toEqual(b);
    expect(a.code).toBe(0);
    expect(a.stdout).toContain('Examples:');
    expect(a.stdout).toContain('--tensors');
  });
  it.each(['quantize', 'moe', 'batch'])('%s --help fits into 80 columns, but for commands to copy', async (name) => {
    const { stdout } = await cli([name, '--help']);
    const options = stdout.slice(0, stdout.indexOf('Examples:'));
    expect(options.split('\n').filter((line) => line.length > 80 && !/^ {2}-.*<[^ ]+>$/.test(line))).toEqual([]);
  });
});

describe('usage errors exit with 2 and say what was meant', () => {
  it.each([
    [['inspct', 'x'], 'Did you mean inspect?'],
    [['inspect', 'x', '--tensor'], 'Did you mean --tensors?'],
    [['inspect'], '<model> is missing'],
    [['inspect', 'a', 'b'], 'Too many arguments'],
    [['doctor', '--progress', 'plian'], 'Did you mean plain?'],
    [['doctor', '--progress'], 'argument missing'],
    [['inspect', 'a', '--input-model', 'b'], 'given twice'],
    [['--input-model', 'a', '--output-model', 'b'], '--target-arch moe'],
    [['--input-model', 'a', '--target-arch', 'transformer'], 'expected moe or dense'],
    [['--quiet'], 'No command'],
  ])('%j', async (args, expected) => {
    const { code, stdout, stderr } = await cli(args);
    expect(stderr).toContain(expected);
    expect([code, stdout]).toEqual([2, '']);
  });
  it('as JSON under --json, and nothing else on stdout', async () => {
    const finished = await cli(['inspect', 'x', '--tensor', '--json']);
    const { ok, error } = json<Failure>(finished);
    expect([finished.code, ok, error.kind, error.exitCode]).toEqual([2, false, 'usage', 2]);
    expect(error.hint).toBe('Did you mean --tensors?');
  });
});

describe('options', () => {
  it('come from the command line, then the environment, then the file', async () => {
    const file = join(folder, 'job.yaml');
    writeFileSync(file, 'json: true\ninspect: {tensors: true}\n');
    const args = ['inspect', v1, '--config-file', file];
    expect(json(await cli(args))).toHaveProperty('tensors');
    const env = { DEEPSEEK_CONVERT_TENSORS: 'false' };
    expect(json(await cli(args, { env }))).not.toHaveProperty('tensors');
    expect(json(await cli([...args, '--tensors'], { env }))).toHaveProperty('tensors');
    expect((await cli([...args, '--no-json'], { env })).stdout).toMatch(/^Model /);
  });
  it('a file may choose the command and give its arguments', async () => {
    const file = join(folder, 'whole.yaml');
    writeFileSync(file, `command: inspect\ninput: ${v1}\n`);
    expect((await cli(['--config-file', file])).stdout).toContain('6,031,616');
    writeFileSync(file, `command: inspekt\n`);
    expect((await cli(['--config-file', file])).stderr).toContain('Did you mean inspect?');
  });
  it('an unknown variable with our prefix is told of', async () => {
    const { code, stderr } = await cli(['inspect', v1], { env: { DEEPSEEK_CONVERT_TENSOR: '1' } });
    expect(code).toBe(0);
    expect(stderr).toContain('did you mean DEEPSEEK_CONVERT_TENSORS?');
  });
  it('a bad value names the variable', async () => {
    const { code, stderr } = await cli(['inspect', v1], { env: { DEEPSEEK_CONVERT_TENSORS: 'perhaps' } });
    expect(code).toBe(2);
    expect(stderr).toContain('DEEPSEEK_CONVERT_TENSORS');
  });
});

describe('config show', () => {
  it('says each setting and where it comes from, and runs nothing', async () => {
    const file = join(folder, 'show.yaml');
    writeFileSync(file, 'samples: 9\nquantize: {group-size: 64, bits: 3}\n');
    const args = ['config', 'show', 'quantize', 'no-such-model', '--bits', '8', '--config-file', file];
    const env = { DEEPSEEK_CONVERT_GROUP_SIZE: '32' };
    const finished = await cli([...args, '--json'], { env });
    interface Setting {
      name: string;
      value: unknown;
      from: string;
      by: string | null;
    }
    const settings = new Map(json<{ settings: Setting[] }>(finished).settings.map((s) => [s.name, s]));
    expect(settings.get('bits')).toEqual({ name: 'bits', value: 8, from: 'command line', by: '--bits' });
    expect(settings.get('group-size')).toMatchObject({
      value: 32,
      from: 'environment',
      by: 'DEEPSEEK_CONVERT_GROUP_SIZE',
    });
    expect(settings.get('samples')).toMatchObject({ value: 9, from: 'config file', by: `samples in ${file}` });
    expect(settings.get('out')).toMatchObject({ value: null, from: 'not given' });
    expect(settings.get('method')).toMatchObject({ value: 'gptq', from: 'default' });
    const { stdout, code } = await cli(args, { env });
    expect(code).toBe(0);
    expect(stdout).toMatch(/^group-size +32 +environment: DEEPSEEK_CONVERT_GROUP_SIZE$/m);
  });
  it.each([
    [['config', 'show'], 'needs a command'],
    [['config', 'show', 'quantise'], 'Did you mean quantize?'],
    [['config', 'show', 'quantize', '--bitz', '4'], 'Did you mean --bits?'],
    [['config', 'show', 'quantize', '--bits', 'four'], '--bits'],
  ])('%j is refused', async (args, expected) => {
    const { code, stderr } = await cli(args);
    expect([code, stderr]).toEqual([2, expect.stringContaining(expected)]);
  });
});

describe('output', () => {
  it('is one versioned object under --json', async () => {
    const { code, stdout, stderr } = await cli(['inspect', v1, '--json']);
    expect([code, stderr]).toEqual([0, '']);
    expect(JSON.parse(stdout)).toMatchObject({
      schema: 'deepseek-convert/1',
      version: expect.stringMatching(/^\d+\.\d+\.\d+$/) as string,
      command: 'inspect',
      ok: true,
    });
  });
  it('has colours only where they are wanted', async () => {
    const escape = '\u001b[';
    expect((await cli(['inspect', v1])).stdout).not.toContain(escape);
    expect((await cli(['inspect', v1], { env: { FORCE_COLOR: '1' } })).stdout).toContain(escape);
    expect((await cli(['inspect', v1], { env: { FORCE_COLOR: '1', NO_COLOR: '1' } })).stdout).not.toContain(escape);
    expect((await cli(['inspect', v1, '--no-color'], { env: { FORCE_COLOR: '1' } })).stdout).not.toContain(escape);
    expect((await cli(['nope'], { env: { FORCE_COLOR: '1' } })).stderr).toContain(escape);
  });
  it('may be cut off by whoever reads it', async () => {
    const { code, stderr } = await shell(`deepseek-convert inspect ${v1} --tensors | head -1; exit \${PIPESTATUS[0]}`);
    expect([code, stderr]).toEqual([0, '']);
  });
});

describe('doctor', () => {
  it('says what is there, with the places where libraries were looked for', async () => {
    const finished = await cli(['doctor', '--json']);
    const { checks } = json<{ checks: { name: string; state: string; tried?: string[] }[] }>(finished);
    expect(finished.code).toBe(0);
    const state = Object.fromEntries(checks.map((check) => [check.name, check.state]));
    expect(state).toMatchObject({
      Node: 'ok',
      'Native core': 'ok',
      'Tokenizer library': 'ok',
      Memory: 'ok',
      Disk: 'ok',
    });
    expect(checks.find(({ name }) => name === 'OpenBLAS')!.tried!.length).toBeGreaterThan(0);
  });
  it('exits with 4 when the native core is not there', async () => {
    const { code, stdout, stderr } = await cli(['doctor'], { env: { DEEPSEEK_CONVERT_BUILD: join(folder, 'empty') } });
    expect(code).toBe(4);
    expect(stdout).toMatch(/Native core +failed/);
    expect(stderr).toContain('npm run build:native');
    expect(stderr).not.toContain('no option of any command');
  });
  it('exits with 4 when the native core does not load', async () => {
    const broken = join(folder, 'broken');
    mkdirSync(broken);
    writeFileSync(join(broken, 'deepseek_convert.node'), 'not a library');
    const { code, stdout } = await cli(['doctor'], { env: { DEEPSEEK_CONVERT_BUILD: broken } });
    expect(code).toBe(4);
    expect(stdout).toContain('Rebuild it here: npm run build:native');
  });
});
