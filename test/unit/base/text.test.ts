import { describe, expect, it } from 'vitest';
import { formatBytes } from '../../../src/base/files.js';
import { columns, displayWidth, duration, shellQuote, short } from '../../../src/base/text.js';

describe('text for people', () => {
  it('shows numbers short', () => {
    expect([0, 998, 6_120_000, 671e9, 999_700, 1e15].map(short)).toEqual([
      '0',
      '998',
      '6.12 M',
      '671 B',
      '1.00 M',
      '1000 T',
    ]);
    expect([999, 999_700, 12_067_360].map(formatBytes)).toEqual(['999 B', '1.00 MB', '12.1 MB']);
  });
  it('shows times', () => {
    expect([0.0312, 7.25, 99.96, 245, 3599.7, 11_520].map(duration)).toEqual([
      '0.03 s', '7.3 s', '1 min 40 s', '4 min 05 s', '1 h 00 min', '3 h 12 min',
    ]); // prettier-ignore
  });
  it('aligns columns by what is seen', () => {
    expect(displayWidth('\u001b[32mok\u001b[39m')).toBe(2);
    expect(displayWidth('词元')).toBe(4);
    expect(columns([['a', '1', 'x'], ['词元', '234', '']], 'lrl')).toBe('a       1  x\n词元  234'); // prettier-ignore
  });
  it('quotes for a shell', () => {
    expect(shellQuote('--out=a/b.bin')).toBe('--out=a/b.bin');
    expect(shellQuote("it's $HOME")).toBe(`'it'\\''s $HOME'`);
    expect(shellQuote('')).toBe(`''`);
  });
});
