import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { cli, fixture, json, v1, workFolder } from './support.js';

const folder = workFolder();
const expected = JSON.parse(readFileSync(fixture('generations.json'), 'utf8')) as {
  generations: { prompt: string; promptTokens: number[]; tokens: number[]; logprobs: number[] }[];
  score: { tokens: number[]; logprobs: number[] };
};

interface Generations {
  generations: { promptTokens: number[]; text: string; tokens: { id: number; text: string; logprob: number }[] }[];
}
const generate = async (...flags: string[]) => cli(['generate', v1, '--device', 'cpu', ...flags]);

describe('generate', () => {
  it('continues as transformers does, greedily, several prompts together', async () => {
    const prompts = expected.generations.flatMap(({ prompt }) => ['--prompt', prompt]);
    const finished = await generate(...prompts, '--greedy', '--ignore-eos', '--max-new-tokens', '24', '--json');
    const { generations } = json<Generations>(finished);
    for (const [i, { promptTokens, tokens, logprobs }] of expected.generations.entries()) {
      expect(generations[i]!.promptTokens).toEqual(promptTokens);
      expect(generations[i]!.tokens.map(({ id }) => id)).toEqual(tokens);
      generations[i]!.tokens.forEach(({ logprob }, t) => expect(logprob).toBeCloseTo(logprobs[t]!, 3));
    }
  });
  it('draws the same with the same seed, and otherwise with another', async () => {
    const flags = ['--prompt', 'The sea', '--max-new-tokens', '16'];
    const [a, b, c] = await Promise.all([
      generate(...flags, '--seed', '5'),
      generate(...flags, '--seed', '5'),
      generate(...flags, '--seed', '6'),
    ]);
    expect(a.stdout).toBe(b.stdout);
    expect(a.stdout).not.toBe(c.stdout);
    expect(a.stdout.startsWith('The sea')).toBe(true);
  });
  it('reads a prompt from a file', async () => {
    const path = join(folder, 'prompt.txt');
    writeFileSync(path, 'The sea');
    const flags = ['--greedy', '--max-new-tokens', '4'];
    const [a, b] = await Promise.all([
      generate('--prompt', 'The sea', ...flags),
      generate('--prompt-file', path, ...flags),
    ]);
    expect(a.stdout).toBe(b.stdout);
  });
  it.each([
    [[], 2, '--prompt <text> is missing'],
    [['--prompt', 'x', '--greedy', '--top-k', '5'], 2, '--greedy leaves nothing to draw'],
    [['--prompt', 'x', '--max-new-tokens', '600'], 2, "longer than the model's context"],
    [['--prompt-file', '/nowhere'], 1, 'no such file'],
  ])('refuses %j', async (flags, code, message) => {
    const finished = await generate(...flags);
    expect(finished.stderr).toContain(message);
    expect([finished.code, finished.stdout]).toEqual([code, '']);
  });
});

describe('score', () => {
  const path = join(folder, 'text.txt');
  const { text } = JSON.parse(readFileSync(fixture('samples.jsonl'), 'utf8').split('\n')[0]!) as { text: string };
  writeFileSync(path, text);

  it("gives transformers' log-probabilities and their mean", async () => {
    const { tokens, logprobs } = expected.score;
    const flags = [
      '--text',
      path,
      '--max-tokens',
      String(tokens.length),
      '--device',
      'cpu',
      '--dtype',
      'f32',
      '--json',
    ];
    const result = json<{
      perplexity: number;
      tokens: number;
      logprobs: (number | null)[];
      texts: { tokens: { id: number; logprob: number | null }[]; scored: number }[];
    }>(await cli(['score', v1, ...flags]));
    const [only] = result.texts;
    expect(only!.tokens.map(({ id }) => id)).toEqual(tokens);
    expect(only!.tokens[0]!.logprob).toBeNull();
    only!.tokens.slice(1).forEach(({ logprob }, t) => expect(logprob).toBeCloseTo(logprobs[t]!, 3));
    expect(result.tokens).toBe(tokens.length);
    expect(result.logprobs).toEqual(only!.tokens.map(({ logprob }) => logprob));
    const mean = logprobs.reduce((a, b) => a + b, 0) / logprobs.length;
    expect(result.perplexity / Math.exp(-mean)).toBeCloseTo(1, 4);
  });
  it('refuses what is no text', async () => {
    const binary = await cli(['score', v1, '--text', v1]);
    expect(binary.stderr).toContain('not UTF-8');
    expect(binary.code).toBe(1);
    expect((await cli(['score', v1])).code).toBe(2);
  });
});
