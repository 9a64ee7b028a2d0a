import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { Random } from '../../src/base/rng.js';
import { decode, encode } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { openModel } from '../../src/arch/open.js';
import { quantize } from '../../src/quant/run.js';
import { defaultRecipe } from '../../src/quant/scheme.js';
import { readImatrix } from '../../src/targets/imatrix.js';
import { testEnv, trainedModel } from '../arch/support.js';
import { llamaScore, type LlamaScore } from './llama.js';
import { convert, heldOut, python, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();
const window = 500;

/** Mean KL(reference || candidate) of the kept rows of each window, nats. */
function kl(reference: LlamaScore, candidate: LlamaScore, windows: number): number[] {
  const rows = reference.rows.length / windows;
  return Array.from({ length: windows }, (_, w) => {
    let sum = 0;
    for (let r = w * rows; r < (w + 1) * rows; r++) {
      const [p, q] = [reference.rows[r]!, candidate.rows[r]!];
      for (let v = 0; v < p.length; v++) sum += Math.exp(p[v]!) * (p[v]! - q[v]!);
    }
    return sum / rows;
  });
}

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length;

/** Mean of the differences of pairs, and its standard error. */
function paired(a: readonly number[], b: readonly number[]): { difference: number; error: number } {
  const each = a.map((value, i) => value - b[i]!);
  const difference = mean(each);
  return { difference, error: Math.sqrt(mean(each.map((d) => (d - difference) ** 2)) / (each.length - 1)) };
}

const percent = (value: number, of: number): string => `${((100 * value) / of).toFixed(1)}%`;

test.each([
  ['dense-6m', trainedModel('v1.0', 'v1.0_checkpoint.bin'), 12],
  ['dense-32m', trainedModel('dense-32m'), 8],
])(
  'Q4_K_M of %s with our importance is not worse in KL than without, in llama.cpp',
  async (name, path, windows) => {
    if (path === undefined) return;
    const file = (kind: string) => join(work, `${name}-${kind}`);
    const recipe = { ...defaultRecipe, method: 'rtn' } as const;
    const common = { input: path, tool: { name: 'deepseek-convert', version: '0' }, commandLine: 'test' };
    const calibration = { source: 'default', samples: 64, seqLen: 256, seed: 0 } as const;
    await quantize({ ...common, out: file('imatrix'), formats: ['imatrix'], recipe, calibration }, env);
    const imatrix = join(file('imatrix'), 'model.gguf');
    const [full, plain, weighted, feedback] = ['full', 'plain', 'weighted', 'feedback'].map((kind) => file(`${kind}.gguf`)) as [string, string, string, string]; // prettier-ignore
    await convert({ input: path, format: 'gguf', dtype: 'f32' }, full, env);
    await convert({ input: path, format: 'gguf', blocks: 'q4_k_m' }, plain, env);
    await convert({ input: path, format: 'gguf', blocks: 'q4_k_m', imatrix }, weighted, env);
    const mixture = { ...defaultRecipe, blocks: 'q4_k', mixture: 'q4_k_m' } as const;
    await quantize({ ...common, out: feedback, formats: ['gguf'], recipe: mixture, calibration, scope: 'all' }, env);
    expect(readFileSync(plain).equals(readFileSync(weighted))).toBe(false);
    const open = await openModel(full);
    const all = await (await open.tokenizer()).encode(heldOut(), { special: false });
    await open.close();
    // Windows from all over the text, which is of several kinds.
    const starts = Array.from({ length: windows }, (_, i) => Math.floor((i * (all.length - window)) / (windows - 1)));
    const tokens = Int32Array.from(starts.flatMap((from) => [...all.subarray(from, from + window)]));
    const reference = await llamaScore(full, tokens, window, 4);
    const of = async (path: string) => kl(reference, await llamaScore(path, tokens, window, 4), windows);
    const [without, with_, fed] = [await of(plain), await of(weighted), await of(feedback)];
    const [importance, errorFeedback] = [paired(with_, without), paired(fed, without)];
    const base = mean(without);
    console.log(
      `Q4_K_M of ${name}, KL to f32 in llama.cpp: ${base.toFixed(5)} without; with importance ${percent(importance.difference, base)} +- ${percent(importance.error, base)}, with error feedback ${percent(errorFeedback.difference, base)} +- ${percent(errorFeedback.error, base)}`,
    );
    // Channels of these models are much alike, so weights alone move KL by no more than a few per cent (docs/exports.md).
    expect(importance.difference).toBeLessThan(2 * importance.error);
    expect(importance.difference).toBeLessThan(0.02 * base);
    expect(errorFeedback.difference).toBeLessThan(-0.1 * base);
  },
  900_000,
);

test('the weighted search of Q4_K leaves no more weighted error than ggml’s', async () => {
  const [rows, columns] = [48, 256];
  const random = new Random(11);
  const normal = () => Math.sqrt(-2 * Math.log(1 - random.uniform())) * Math.cos(2 * Math.PI * random.uniform());
  const weights = Float32Array.from({ length: rows * columns }, () => 0.04 * normal());
  // Energies of channels differ by orders of magnitude, as they do in large models.
  const energy = Float32Array.from({ length: columns }, () => Math.exp(1.5 * normal()));
  const [a, b] = [join(work, 'weights.f32'), join(work, 'energy.f32')];
  writeFileSync(a, weights);
  writeFileSync(b, energy);
  const theirs = await python<{ error: number }>('ggml_q4k.py', a, b);
  using scope = new Scope(env.device);
  const w = scope.from('f32', [rows, columns], weights);
  const errorOf = async (importance?: Float32Array): Promise<number> => {
    const blocks = encode(scope, w, 'q4_k', importance && scope.from('f32', [columns], importance));
    const values = await decode(scope, blocks, 'q4_k', [rows, columns], 'f32').float32();
    return values.reduce((sum, value, i) => sum + energy[i % columns]! * (value - weights[i]!) ** 2, 0);
  };
  const [ours, unweighted] = [await errorOf(energy), await errorOf()];
  console.log(
    `Q4_K, weighted error: ours ${ours.toFixed(4)}, ggml's ${theirs.error.toFixed(4)}, without importance ${unweighted.toFixed(4)}`,
  );
  expect(ours).toBeLessThan(theirs.error);
  expect(ours).toBeLessThan(0.9 * unweighted);
});

test('importance matrices that the Python reader writes are read, of both forms', async () => {
  const [gguf, dat] = [join(work, 'made.gguf'), join(work, 'made.dat')];
  const wanted = await python<Record<string, number[]>>('make_imatrix.py', gguf, dat);
  for (const file of [gguf, dat]) {
    const found = await readImatrix(file);
    for (const [name, values] of Object.entries(wanted)) {
      expect([...found.get(name)!.values].map((value) => Number(value.toFixed(4)))).toEqual(values);
    }
  }
  writeFileSync(dat, readFileSync(dat).subarray(0, 40));
  await expect(readImatrix(dat)).rejects.toThrow(/ends early/);
});
