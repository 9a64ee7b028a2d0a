import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { compareModels, type SidesResult } from '../../src/validate/sides.js';
import type { AttentionMode, LayerError } from '../../src/validate/report.js';
import type { Windows } from '../../src/validate/texts.js';
import { compareGenerations } from '../../src/validate/generations.js';
import { writeInt4 } from './int4.js';
import { damage, dense, env, moe, shared, truncate, useModels } from './models.js';

type Maps = Pick<AttentionMode, 'divergence' | 'cosine' | 'overlap'>;
interface Load {
  load: number[];
  maxVio: number;
  entropy: number;
}
interface Expected {
  tokens: number[][];
  attention: { teacherForced: Maps; freeRunning: Maps };
  layers: { teacherForced: LayerError; freeRunning: LayerError }[];
  routing: (Load & {
    layer: number;
    reference: Load;
    agreement: { teacherForced: number; freeRunning: number };
  })[];
  logits: Pick<SidesResult['logits'], 'kl' | 'top1' | 'perplexity' | 'flips'>;
  weights: Record<string, number>;
}
interface Diversity {
  responses: number[][];
  perResponse: number[];
  corpus: number[];
  ead: number;
  repetition: number[];
  selfBleu: number;
}
interface Int4 extends Expected {
  group: number;
  codes: string;
  generations: { prompts: number[][]; newTokens: number; reference: Diversity; candidate: Diversity };
}
const load = (name: string): unknown =>
  JSON.parse(readFileSync(new URL(`../../fixtures/validate/${name}.json`, import.meta.url), 'utf8'));
const int4 = load('int4') as Record<'dense' | 'moe', Int4>;
const expected = load('expected') as Record<'dense' | 'moe' | 'int4', Expected>;

useModels();

const windowsOf = ({ tokens }: Expected): Windows[] => [
  { name: 'text', tokens: Int32Array.from(tokens.flat()), n: tokens.length, length: tokens[0]!.length, sha256: '' },
];

async function compare(reference: string, candidate: string, windows: Windows[], batchTokens?: number) {
  const [a, b] = [await openModel(reference), await openModel(candidate)];
  try {
    const options = {
      dtype: 'f32',
      resamples: 100,
      seed: 0,
      ...(batchTokens !== undefined && { batchTokens }),
    } as const;
    return await compareModels(a, b, windows, options, env);
  } finally {
    await Promise.all([a.close(), b.close()]);
  }
}

/** Everything is equal within 1e-4 of the value. */
function expectNear(got: unknown, wanted: unknown, at = ''): void {
  if (typeof wanted === 'number') {
    const near = Math.abs((got as number) - wanted) <= 1e-4 * Math.abs(wanted) + 2e-6;
    if (!near) expect(got, at).toBe(wanted);
    return;
  }
  const keys = Object.keys(wanted as object);
  expect(keys.length, at).toBeGreaterThan(0);
  for (const key of keys) {
    expectNear((got as Record<string, unknown>)[key], (wanted as Record<string, unknown>)[key], `${at}.${key}`);
  }
}

function expectAll(got: SidesResult, wanted: Expected): void {
  expectNear(got.attention, wanted.attention, 'attention');
  expectNear(got.layers, wanted.layers, 'layers');
  expectNear(got.logits, wanted.logits, 'logits');
  if (wanted.routing.length > 0) expectNear(got.routing?.layers, wanted.routing, 'routing');
  else expect(got.routing).toBeUndefined();
}

describe('against transformers in fp32', () => {
  it('a dense model and its truncated weights', async () => {
    const candidate = await damage.copy(dense, 'dense-truncated', truncate);
    const got = await compare(dense, candidate, windowsOf(expected.dense));
    expectAll(got, expected.dense);
    const oProj = got.weights.kinds.find(({ kind }) => kind === 'self_attn.o_proj.weight')!;
    expect(oProj.count).toBe(4);
    expect(oProj.mean).toBeCloseTo(expected.dense.weights['model.layers.1.self_attn.o_proj.weight']!, 2);
  });

  it('a mixture of experts with MLA and its truncated weights', async () => {
    const candidate = await damage.copy(moe, 'moe-truncated', truncate);
    expectAll(await compare(moe, candidate, windowsOf(expected.moe)), expected.moe);
  });

  it('INT4 by llm-compressor', async ({ skip }) => {
    const candidate = shared('models/dense-6m-int4-llmcompressor');
    if (!existsSync(candidate)) skip('../shared is not here');
    expectAll(await compare(shared('models/dense-6m'), candidate, windowsOf(expected.int4)), expected.int4);
  });

  it.each([
    ['dense-6m', 'dense', dense],
    ['moe-6m', 'moe', moe],
  ] as const)('%s and its INT4: patterns, errors, KL, perplexity, routing', async (_, key, model) => {
    const wanted = int4[key];
    const candidate = join(damage.folder, `${key}-int4`);
    expect(await writeInt4(model, candidate, wanted.group)).toBe(wanted.codes);
    expectAll(await compare(model, candidate, windowsOf(wanted)), wanted);

    // Greedy, so that two implementations can write the same.
    const { prompts, newTokens, ...sides } = wanted.generations;
    const [a, b] = [await openModel(model), await openModel(candidate)];
    try {
      const tokenizer = await a.tokenizer();
      const options = { newTokens, temperature: 0, seed: 0, dtype: 'f32', resamples: 100 } as const;
      const given = prompts.map((ids) => ({ text: '', ids: Int32Array.from(ids) }));
      const got = await compareGenerations(a, b, tokenizer, given, options, env);
      for (const side of ['reference', 'candidate'] as const) {
        const { responses, perResponse, corpus, ead, repetition, selfBleu } = sides[side];
        const texts = await Promise.all(responses.map((ids) => tokenizer.decode(ids)));
        expect(got.pairs.map((pair) => pair[side])).toEqual(texts);
        const numbers = { distinct: { perResponse, corpus }, ead, repetition, selfBleu };
        expectNear(got[side], numbers, side);
      }
      const repetition = got.differences.find(({ metric }) => metric === 'rep-4')!;
      const change = sides.candidate.repetition[2]! - sides.reference.repetition[2]!;
      expect(repetition.difference).toBeCloseTo(change, 5);
    } finally {
      await Promise.all([a.close(), b.close()]);
    }
  });
});
