import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { fromConfigFile, readConfigFile } from '../../../src/base/config.js';
import { flag, integer, list, resolveOptions, text } from '../../../src/base/options.js';
import { refusal } from '../../support/refusal.js';

const folder = mkdtempSync(join(tmpdir(), 'config-'));
afterAll(() => rmSync(folder, { recursive: true }));

const table = {
  input: text({ help: '', aliases: ['input-model'] }),
  groupSize: integer({ default: 128, help: '' }),
  seed: integer({ help: '' }),
  overwrite: flag({ help: '' }),
  ignore: list({ help: '' }),
  maxKl: text({ help: '', group: 'gates' }),
} as const;

async function given(content: string, command = 'quantize') {
  const path = join(folder, 'job.yaml');
  writeFileSync(path, content);
  const file = await readConfigFile(path);
  return resolveOptions(table, [fromConfigFile(file, command, ['quantize', 'moe'], table)]).values;
}

describe('a config file', () => {
  it('gives options by name, in any of the usual spellings', async () => {
    const content = 'input_model: v1.bin\ngroupSize: 64\noverwrite: true\nignore: [lm_head, 3]\nseed:\n';
    expect(await given(content)).toEqual({
      input: 'v1.bin', groupSize: 64, overwrite: true, ignore: ['lm_head', '3'], seed: undefined, maxKl: undefined,
    }); // prettier-ignore
  });
  it("reads the command's own section last and leaves others alone", async () => {
    const content = 'group-size: 64\nquantize: {group-size: 32}\nmoe: {experts: 8}\n';
    expect((await given(content)).groupSize).toBe(32);
    expect((await given('group-size: 64\nmoe: {group-size: 16}\n')).groupSize).toBe(64);
  });
  it('keeps large numbers exact, and refuses those that are not', async () => {
    expect((await given('seed: 9007199254740991')).seed).toBe(2 ** 53 - 1);
    expect((await refusal(given('seed: 9007199254740993'))).message).toContain('9007199254740993');
  });
  it('takes a group as a mapping of its own options, at the top and in a section', async () => {
    expect((await given('gates: {max-kl: 0.1}\n')).maxKl).toBe('0.1');
    expect((await given('gates: {max-kl: 0.1}\nquantize: {gates: {max_kl: off}}\n')).maxKl).toBe('off');
    expect((await given('max-kl: 3\n')).maxKl).toBe('3');
    const other = await refusal(given('gates: {seed: 1}\n'));
    expect(other.message).toContain('gates.seed in');
    const near = await refusal(given('quantize: {gates: {max-kk: 1}}\n'));
    expect(near.message).toContain('quantize.gates.max-kk in');
    expect(near.message).toContain('Did you mean max-kl?');
  });
  it('says which key is unknown, and what it may have meant', async () => {
    const error = await refusal(given('grup-size: 64'));
    expect(error.kind).toBe('usage');
    expect(error.message).toMatch(/no option "grup-size" \(grup-size in .*job\.yaml\)\n.*Did you mean group-size\?/);
    expect((await refusal(given('quantize: {sed: 1}'))).message).toContain('quantize.sed in');
  });
  it.each([
    ['group-size: 12.5', 'a whole number'],
    ['group-size: {a: 1}', 'a text, a number, true, false'],
    ['ignore: [[a]]', 'Nested lists'],
    ['overwrite: 7', 'true or false'],
  ])('refuses %s', async (content, expected) => {
    const error = await refusal(given(content));
    expect(error.kind).toBe('usage');
    expect(error.message).toContain(expected);
    expect(error.message).toContain('job.yaml');
  });
  it.each([
    ['- a\n- b', 'must be a mapping'],
    ['a: [1', 'not valid YAML'],
    ['a: 1\na: 2', 'unique'],
  ])('refuses the file %j', async (content, expected) => {
    const error = await refusal(given(content));
    expect(error.kind).toBe('input');
    expect(error.message).toContain(expected);
  });
  it('that is not there is a clear error', async () => {
    expect((await refusal(readConfigFile(join(folder, 'none.yaml')))).message).toContain('no such file');
  });
});
