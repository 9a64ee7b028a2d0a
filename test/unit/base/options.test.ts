import { describe, expect, it } from 'vitest';
import { asTyped,
  byteSize, choice, environmentName, flag, flagName, fromEnvironment, integer, list, mergeTables, number,
  resolveOptions, text, type Given, type OptionTable,
} from '../../../src/base/options.js'; // prettier-ignore
import { refusal } from '../../support/refusal.js';

const typed = (entries: Record<string, Given['raw']>, from: Given['from'] = 'command line') =>
  new Map(Object.entries(entries).map(([key, raw]) => [key, { from, name: `--${flagName(key)}`, raw }]));

const table = {
  bits: integer({ default: 4, min: 2, max: 8, help: '' }),
  groupSize: integer({ default: 128, help: '', aliases: ['group'] }),
  rate: number({ help: '', min: 0 }),
  method: choice(['gptq', 'awq', 'rtn'], { default: 'gptq', help: '' }),
  shardSize: byteSize({ help: '' }),
  overwrite: flag({ help: '' }),
  verify: flag({ default: true, off: 'Off.', help: '' }),
  ignore: list({ help: '', separator: ',' }),
  prompt: list({ help: '' }),
} as const;

const values = (sources: Map<string, Given>[], of: OptionTable = table) => resolveOptions(of, sources).values;

describe('names', () => {
  it('are made from the key', () => {
    expect(flagName('maxNewTokens')).toBe('max-new-tokens');
    expect(environmentName('maxNewTokens')).toBe('DEEPSEEK_CONVERT_MAX_NEW_TOKENS');
  });
  it('of a flag that is on are typed to turn it off, and say so', () => {
    expect(asTyped('verify', table.verify)).toEqual({ name: 'no-verify', help: 'Off.' });
    expect(asTyped('overwrite', table.overwrite)).toEqual({ name: 'overwrite', help: '' });
  });
});

describe('precedence', () => {
  const file = typed({ bits: '3', groupSize: '32', rate: '0.5' }, 'config file');
  const environment = fromEnvironment(table, { DEEPSEEK_CONVERT_BITS: '5', DEEPSEEK_CONVERT_GROUP: '64', OTHER: '1' });

  it('is command line, environment, file, default', () => {
    const resolved = resolveOptions(table, [typed({ bits: '8' }), environment, file]);
    expect(resolved.values).toMatchObject({ bits: 8, groupSize: 64, rate: 0.5, method: 'gptq', verify: true });
    expect(resolved.from).toEqual({ bits: 'command line', groupSize: 'environment', rate: 'config file' });
  });
  it('takes an empty variable as not set', () => {
    expect(fromEnvironment(table, { DEEPSEEK_CONVERT_BITS: '' }).size).toBe(0);
  });
  it('gives a frozen object', () => {
    const resolved = values([typed({ ignore: ['a', 'b'] })]);
    expect(Object.isFrozen(resolved)).toBe(true);
    expect(Object.isFrozen(resolved.ignore)).toBe(true);
  });
});

describe('values', () => {
  it.each([
    ['5GB', 5e9],
    ['512MiB', 512 * 2 ** 20],
    ['1.5g', 1.5e9],
    ['64 kB', 64_000],
    ['4096', 4096],
    ['7b', 7],
  ])('reads the size %s', (given, bytes) => {
    expect(values([typed({ shardSize: given })]).shardSize).toBe(bytes);
  });
  it.each(['', 'GB', '-5GB', '5 XB', '1e9', '0', '5iB'])('refuses the size "%s"', async (given) => {
    const error = await refusal(() => values([typed({ shardSize: given })]));
    expect(error.kind).toBe('usage');
    expect(error.message).toContain('--shard-size');
  });
  it.each([
    ['bits', '9', 'a whole number from 2 to 8'],
    ['bits', '4.0', 'a whole number'],
    ['bits', '0x4', 'a whole number'],
    ['groupSize', '99999999999999999999', 'a whole number'],
    ['rate', 'NaN', 'a number of at least 0'],
    ['rate', ' ', 'a number'],
    ['rate', '-1', 'a number of at least 0'],
    ['overwrite', 'maybe', 'true or false'],
    ['bits', ['4', '8'], 'one value'],
    ['prompt', '', 'not empty'],
  ])('refuses %s %j', async (key, raw, expected) => {
    const error = await refusal(() => values([typed({ [key]: raw })]));
    expect(error.kind).toBe('usage');
    expect(error.message).toContain(expected);
  });
  it('knows what a near miss meant', async () => {
    expect((await refusal(() => values([typed({ method: 'gptc' })]))).message).toContain('Did you mean gptq?');
  });
  it('splits a list only where the table says so', () => {
    const given = values([typed({ ignore: ['lm_head, gate', 'x'], prompt: ['Hello, world', 'b'] })]);
    expect(given.ignore).toEqual(['lm_head', 'gate', 'x']);
    expect(given.prompt).toEqual(['Hello, world', 'b']);
    expect(values([])).toMatchObject({ ignore: [], prompt: [] });
  });
  it('takes off as well as on', () => {
    expect(values([typed({ verify: false, overwrite: true })])).toMatchObject({ verify: false, overwrite: true });
    expect(values([typed({ verify: 'No', overwrite: '1' })])).toMatchObject({ verify: false, overwrite: true });
  });
  it('asks for what is required, by all its names', async () => {
    const of = { out: text({ required: true, short: 'o', value: 'path', help: 'Where it goes.' }) };
    expect((await refusal(() => values([], of))).message).toBe('-o (--out) <path> is missing\n  Where it goes.');
  });
});

describe('tables', () => {
  it('are merged, never shadowed', () => {
    expect(Object.keys(mergeTables({ a: table.bits }, { b: table.rate }))).toEqual(['a', 'b']);
    expect(() => mergeTables({ a: table.bits }, { a: table.rate })).toThrow('defined twice');
  });
});
