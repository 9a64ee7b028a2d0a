import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { calibrationTokens, defaultCalibrationFolder, type CalibrationOptions } from '../../../src/arch/calibration.js';
import { openModel } from '../../../src/arch/open.js';
import { fixture, testEnv } from '../../arch/support.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
const open = await openModel(fixture('v1.0/v1.0_checkpoint.bin'));
const tokenizer = await open.tokenizer();
afterAll(async () => {
  rmSync(folder, { recursive: true, force: true });
  await open.close();
});

function file(name: string, content: string | Uint8Array): string {
  const path = join(folder, name);
  writeFileSync(path, content);
  return path;
}
const sentence = (i: number): string => `Sentence number ${i} of a text about rivers, tables and the weather in May.\n`;
const long = file('long.txt', Array.from({ length: 400 }, (_, i) => sentence(i)).join(''));
const chinese = file('zh.txt', '从山脚到山顶要走三个小时，挑夫们把它分成九段。'.repeat(200));
const take = (more: Partial<CalibrationOptions>) =>
  calibrationTokens(open, { source: [long], samples: 8, seqLen: 32, seed: 0, ...more }, env);
const bos = 0;

describe('calibration windows', () => {
  it('are as many and as long as asked, begin with BOS, and are spread over the text', async () => {
    const set = await take({});
    expect(set.tokens).toHaveLength(8 * 32);
    expect(set.notices).toEqual([]);
    const numbers: number[] = [];
    for (let i = 0; i < 8; i++) {
      const window = set.tokens.subarray(32 * i, 32 * (i + 1));
      expect(window[0]).toBe(bos);
      numbers.push(Number(/number (\d+)/.exec(await tokenizer.decode(window))![1]));
    }
    // Equal stretches of 400 sentences.
    numbers.forEach((number, i) => expect(Math.abs(number - 50 * i)).toBeLessThan(3));
  });

  it('hold the very tokens of the text', async () => {
    const set = await take({ samples: 1, seqLen: 64 });
    const expected = await tokenizer.encode(readFileSync(long, 'utf8').slice(0, 2000), { special: true });
    expect([...set.tokens]).toEqual([...expected.subarray(0, 64)]);
  });

  it('are refused with ids that the model has no row for', async () => {
    const ids = new Int32Array([...(await take({})).tokens]);
    const vocab = Math.max(...ids);
    const smaller = { ...open, model: { ...open.model, vocab }, tokenizer: open.tokenizer.bind(open) };
    const job = calibrationTokens(smaller, { source: [long], samples: 8, seqLen: 32, seed: 0 }, env);
    await expect(job).rejects.toThrow(`id ${vocab}`);
  });

  it('with BPE-dropout spell the same text otherwise, the same way for the same seed', async () => {
    const [plain, dropped] = [await take({ samples: 1 }), await take({ samples: 1, bpeDropout: 0.3 })];
    expect(dropped.tokens).not.toEqual(plain.tokens);
    expect(dropped.tokens[0]).toBe(bos);
    const text = await tokenizer.decode(dropped.tokens);
    expect((await tokenizer.decode(plain.tokens)).startsWith(text)).toBe(true);
    expect((await take({ samples: 1, bpeDropout: 0.3 })).hash).toBe(dropped.hash);
    await expect(take({ source: 'self', bpeDropout: 0.3 })).rejects.toThrow(/--bpe-dropout respells text from files/);
  });

  it('never begin or end inside a character', async () => {
    const set = await take({ source: [chinese], samples: 20 });
    for (let i = 0; i < 20; i++) {
      const window = set.tokens.subarray(32 * i + 1, 32 * i + 20);
      expect(await tokenizer.decode(window)).not.toMatch(/^\ufffd/);
    }
  });

  it('share sources evenly, and let long ones fill in for short ones', async () => {
    const short = file('short.txt', sentence(1).repeat(6));
    const both = await take({ source: [long, chinese] });
    expect(both.description).toBe('8 x 32 tokens: long.txt 4, zh.txt 4');
    const filled = await take({ source: [short, long], samples: 20 });
    const [, fromShort, fromLong] = /short\.txt (\d+), long\.txt (\d+)/.exec(filled.description)!;
    expect(Number(fromShort)).toBeLessThan(10);
    expect(Number(fromShort)).toBeGreaterThan(1);
    expect(Number(fromShort) + Number(fromLong)).toBe(20);
    expect(filled.notices).toEqual([]);
  });

  it('hold of every source its share in any part of the set', async () => {
    const short = file('short.txt', sentence(1).repeat(6));
    const { tokens, n, description } = await take({ source: [short, long], samples: 40 });
    const few = Number(/short\.txt (\d+)/.exec(description)![1]);
    const texts = await Promise.all(Array.from({ length: n }, (_, i) => tokenizer.decode(tokens.subarray(32 * i, 32 * (i + 1))))); // prettier-ignore
    const at = texts.flatMap((text, i) => (text.includes('number 1 of') && !text.includes('number 2') ? [i] : []));
    const places = Array.from({ length: few }, (_, i) => ((i + 0.5) * n) / few);
    for (const place of places) expect(at.some((i) => Math.abs(i - place) <= 1)).toBe(true);
  });

  it('are written by the model where files hold too little and self stands beside them', async () => {
    const path = file('few.txt', sentence(1).repeat(10));
    const alone = await take({ source: [path], samples: 12 });
    const both = await take({ source: [path, 'self'], samples: 12 });
    expect(both.n).toBe(12);
    expect(both.description).toBe(`12 x 32 tokens: few.txt ${alone.n}, the model itself (seed 0) ${12 - alone.n}`);
    expect(both.notices).toEqual([]);
    const own = await take({ source: 'self', samples: 12 - alone.n });
    const rows = (set: typeof own) => new Set(Array.from({ length: set.n }, (_, i) => set.tokens.subarray(32 * i, 32 * (i + 1)).join())); // prettier-ignore
    expect(rows(both)).toEqual(new Set([...rows(alone), ...rows(own)]));
    expect((await take({ source: [long, 'self'] })).hash).toBe((await take({ source: [long] })).hash);
  });

  it('are pieces of the files that the model goes on from, where continue stands beside them', async () => {
    const path = file('few.txt', sentence(1).repeat(10));
    const alone = await take({ source: [path], samples: 12 });
    const both = await take({ source: [path, 'continue'], samples: 12 });
    expect(both.description).toBe(`12 x 32 tokens: few.txt ${alone.n}, the model itself (continued, seed 0) ${12 - alone.n}`); // prettier-ignore
    const rows = (set: typeof both) =>
      Array.from({ length: set.n }, (_, i) => set.tokens.subarray(32 * i, 32 * (i + 1)));
    const known = rows(alone).map((row) => row.join());
    const written = rows(both).filter((row) => !known.includes(row.join()));
    expect(written).toHaveLength(12 - alone.n);
    for (const row of written) {
      expect(row[0]).toBe(bos);
      expect(known.some((text) => text.includes(`,${row.subarray(1, 4).join()},`))).toBe(true);
      expect(known.some((text) => text.includes(row.subarray(1).join()))).toBe(false);
    }
    await expect(take({ source: ['continue'] })).rejects.toThrow(/No calibration file/);
    await expect(take({ source: [path, 'self', 'continue'] })).rejects.toThrow(/either from BOS on or/);
  });

  it('treat the kinds of a .jsonl file as sources, and mix them', async () => {
    const lines = Array.from({ length: 60 }, (_, i) => ({
      text: sentence(i).repeat(3),
      kind: i < 50 ? 'much' : 'little',
    }));
    const path = file('kinds.jsonl', lines.map((line) => JSON.stringify(line)).join('\n'));
    const set = await take({ source: [path] });
    expect(set.description).toBe('8 x 32 tokens: kinds.jsonl:much 4, kinds.jsonl:little 4');
  });

  it('are fewer when the text is short, and a notice says so', async () => {
    const path = file('few.txt', sentence(1).repeat(10));
    const set = await take({ source: [path], samples: 100 });
    expect(set.n).toBeLessThan(12);
    expect(set.n).toBeGreaterThan(2);
    expect(set.notices.join()).toMatch(/100 were asked for/);
    const one = await take({ source: [file('one.txt', 'Hello there')], samples: 4 });
    expect(one.n).toBe(1);
    expect(one.seqLen).toBeLessThan(8);
    expect(one.notices.join()).toMatch(/Expect a poor result/);
  });

  it('are the same for the same seed and text only', async () => {
    const [a, b, other] = [await take({}), await take({}), await take({ seed: 1 })];
    expect(b.hash).toBe(a.hash);
    expect(other.hash).not.toBe(a.hash);
    expect((await take({ samples: 7 })).hash).not.toBe(a.hash);
    const changed = file('changed.txt', readFileSync(long, 'utf8').replace('Sentence number 0', 'Sentence number 7'));
    expect((await take({ source: [changed] })).hash).not.toBe(a.hash);
  });

  it('come from the tool’s own texts by default: four kinds, no more than the text holds', async () => {
    const set = await take({ source: 'default', samples: 40, seqLen: 128 });
    expect(set.n).toBe(40);
    for (const kind of ['english', 'chinese', 'code', 'dialogue'])
      expect(set.description).toContain(`${kind}.jsonl 10`);
    expect(defaultCalibrationFolder).toMatch(/calibration$/);
    const all = await take({ source: 'default', samples: 1000, seqLen: 512 });
    expect(all.n).toBeGreaterThan(35);
    expect(all.n).toBeLessThan(60);
  });

  it('come from the model itself, seeded', async () => {
    const [a, b] = [
      await take({ source: 'self', samples: 3, seqLen: 12 }),
      await take({ source: 'self', samples: 3, seqLen: 12 }),
    ];
    expect(a.tokens).toEqual(b.tokens);
    expect([a.tokens[0], a.tokens[12], a.tokens[24]]).toEqual([bos, bos, bos]);
    expect([...a.tokens.subarray(0, 12)]).not.toEqual([...a.tokens.subarray(12, 24)]);
    expect((await take({ source: 'self', samples: 3, seqLen: 12, seed: 5 })).tokens).not.toEqual(a.tokens);
    expect(a.description).toMatch(/the model itself/);
  });
});

describe('calibration text that cannot be used', () => {
  const refused: [string, () => string, RegExp][] = [
    ['missing', () => join(folder, 'nowhere.txt'), /nowhere\.txt/],
    ['empty', () => file('empty.txt', ''), /empty/],
    ['without words', () => file('blank.jsonl', '\n\n'), /holds no text/],
    ['not UTF-8', () => file('latin.txt', Buffer.from('caf\xe9 au lait', 'latin1')), /not UTF-8/],
    ['no JSON', () => file('broken.jsonl', '{"text": "a"}\n{"text": \n'), /broken\.jsonl, line 2/],
    ['without a text field', () => file('field.jsonl', '{"content": "a"}\n'), /line 1.*"text"/s],
    ['of another kind', () => file('a.csv', 'a,b'), /\.txt, \.md or \.jsonl/],
  ];
  for (const [name, path, message] of refused) {
    it(`is refused when ${name}`, async () => {
      await expect(take({ source: [path()] })).rejects.toThrow(message);
    });
  }

  it('and lengths beyond the context are refused', async () => {
    await expect(take({ seqLen: open.model.context + 1 })).rejects.toThrow(/--seq-len/);
    await expect(take({ samples: 0 })).rejects.toThrow(/--samples/);
  });
});
