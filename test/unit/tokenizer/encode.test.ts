import { createHash } from 'node:crypto';
import { existsSync, readFileSync, readdirSync } from 'node:fs';
import { expect, test } from 'vitest';
import { loadTokenizer } from '../../../src/tokenizer/tokenizer.js';
import { fixture, shared } from '../../arch/support.js';

const there = existsSync(shared('text'));
if (!there) console.warn('skipped: ../shared/text is not there');
const { texts } = JSON.parse(readFileSync(fixture('tokenizer', 'encode.json'), 'utf8')) as {
  texts: { bytes: number; tokens: number; idsSha256: string }[];
};
// 10 MB take a quarter of a minute: npm run test:tokenizer.
const asked = texts.filter(({ bytes }) => bytes < 2e6 || process.env.TOKENIZER_ALL !== undefined);

test.skipIf(!there).each(asked)(
  '$bytes bytes of text give the ids of the library of Python',
  async (want) => {
    const names = readdirSync(shared('text')).sort();
    const whole = Buffer.concat(names.map((name) => readFileSync(shared('text', name))));
    const text = Buffer.concat([whole, whole]).subarray(0, want.bytes).toString();
    const tokenizer = await loadTokenizer(shared('models', 'dense-6m'));
    const ids = await tokenizer.encode(text);
    const idsSha256 = createHash('sha256').update(ids.join('\n')).digest('hex');
    expect({ bytes: Buffer.byteLength(text), tokens: ids.length, idsSha256 }).toEqual(want);
  },
  600_000,
);
