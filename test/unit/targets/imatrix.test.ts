import { describe, expect, it } from 'vitest';
import { parseImatrix } from '../../../src/targets/imatrix.js';
import { badInputMessage } from '../../support/refusal.js';

const i32 = (...numbers: number[]): Buffer => Buffer.from(Int32Array.from(numbers).buffer);
const entry = (name: Buffer | string, values: number[]): Buffer =>
  Buffer.concat([i32(name.length), Buffer.from(name as string), i32(2, values.length), Buffer.from(Float32Array.from(values).buffer)]); // prettier-ignore
const file = (...entries: Buffer[]): Buffer => Buffer.concat([i32(entries.length), ...entries]);
const message = (bytes: Buffer): Promise<string> => badInputMessage(() => parseImatrix(bytes, 'x.dat'));

describe('the older form of an importance matrix', () => {
  it('is read: sums over calls', () => {
    const found = parseImatrix(file(entry('a', [2, 0, 6]), entry('b', [1])), 'x.dat');
    expect([...found].map(([name, { values }]) => [name, [...values]])).toEqual([['a', [1, 0, 3]], ['b', [0.5]]]); // prettier-ignore
  });

  it('is refused when it is damaged, naming the byte', async () => {
    const whole = file(entry('a', [2, 0, 6]));
    expect(await message(whole.subarray(0, -1))).toContain('the file ends early (x.dat, byte 17)');
    expect(await message(file(entry('a', [1]), entry('a', [1])))).toContain('two entries for "a"');
    expect(await message(file(entry(Buffer.from([0xff]), [1])))).toContain('not UTF-8');
    expect(await message(file(entry('a', [-1])))).toContain('negative or no number');
    expect(await message(file(entry('a', [NaN])))).toContain('negative or no number');
    expect(await message(i32(2 ** 31 - 1))).toContain('a number of entries of 2147483647');
    expect(await message(i32(1, -5))).toContain('a name of -5');
    expect(await message(i32(0))).toContain('is empty');
  });
});
