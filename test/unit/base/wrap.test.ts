import { describe, expect, it } from 'vitest';
import { factRows, reflow, wrap } from '../../../src/base/text.js';

describe('text in narrow terminals', () => {
  it('is broken at spaces, words that are too long stand alone', () => {
    expect(wrap('a bb ccc dddd', 6)).toEqual(['a bb', 'ccc', 'dddd']);
    expect(wrap('looooong a', 4)).toEqual(['looooong', 'a']);
    // East Asian characters take two columns, colours none.
    expect(wrap('\u6587\u5b57 ab', 6)).toEqual(['\u6587\u5b57', 'ab']);
    expect(wrap('\u001b[1mab\u001b[22m cd', 5)).toEqual(['\u001b[1mab\u001b[22m cd']);
  });
  it('goes on below its beginning', () => {
    const text = factRows([['Name', 'one two three four five six'], ['B', 'x']], 26); // prettier-ignore
    expect(text).toBe('Name  one two three four\n      five six\nB     x');
    expect(reflow('  a sentence that is long, is it not', 20)).toBe('  a sentence that is\n  long, is it not');
  });
  it('leaves tables and commands as they are', () => {
    const table = 'weights  10.0 MB  and a lot of words behind it';
    const command = '  deepseek-convert quantize some/model -o some/other/model';
    expect(reflow(`${table}\n${command}`, 30)).toBe(`${table}\n${command}`);
    expect(reflow('any line however long it may be', Infinity)).toBe('any line however long it may be');
  });
});
