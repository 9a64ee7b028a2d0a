import { execFile } from 'node:child_process';
import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, test } from 'vitest';
import type { MoeOptions } from '../../src/moe/options.js';
import { runMoe } from '../../src/moe/run.js';
import { runSurgery } from '../../src/moe/surgery/run.js';
import { quantize } from '../../src/quant/run.js';
import { defaultRecipe } from '../../src/quant/scheme.js';
import { archCase, fixture, testEnv, trainedModel } from '../arch/support.js';
import { ourLogits, python, relativeError, someTokens, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();
const tool = { name: 'deepseek-convert', version: '0' };
const calibration = { source: [fixture('samples.jsonl')], samples: 16, seqLen: 128, seed: 0 };
const dense = trainedModel('v1.0', 'v1.0_checkpoint.bin');

interface Checked {
  readonly mixture: string;
  readonly model_type: string;
  readonly all_on_relative: number;
  readonly names: Record<string, string[]>;
  readonly generated: number[];
}

/** What transformers says of containers of `input`: that they are it with all experts on, no name too many or too few. */
async function containersChecked(input: string, outs: readonly string[]): Promise<Checked[]> {
  const script = fixture('moe/check_container.py');
  const { stdout } = await promisify(execFile)(process.env.INTEROP_PYTHON ?? 'python3', [script, input, ...outs]);
  const checked = stdout.trim().split('\n').map((line) => JSON.parse(line) as Checked); // prettier-ignore
  expect(checked.map(({ mixture }) => mixture)).toEqual(outs);
  for (const { mixture, all_on_relative, names, generated } of checked) {
    expect(all_on_relative, mixture).toBeLessThan(1e-4);
    expect(names).toEqual({});
    expect(generated).toHaveLength(4);
  }
  return checked;
}

test.skipIf(!dense)('transformers loads every container of dense-6m, computes the dense model with all experts on, and generates', async () => {
  const common = { input: dense!, method: 'split', experts: 8, rounds: 1, steps: 4, refit: false, calibration, tool, commandLine: 'test' } as const; // prettier-ignore
  const forms: Partial<MoeOptions>[] = [
    { container: 'glm4_moe', active: 4 },
    { container: 'qwen2_moe', active: 4 },
    { container: 'mixtral', active: 4 },
    { container: 'glm4_moe', experts: 16, active: 3, limit: { groups: 4, topGroups: 2 }, balance: 0.1 },
  ];
  const outs: string[] = [];
  for (const form of forms) {
    const out = join(work, `${form.container}-${form.active}`);
    await runMoe({ ...common, container: 'glm4_moe', active: 4, ...form, out }, env);
    outs.push(out);
  }
  await containersChecked(dense!, outs);
}); // prettier-ignore

test.each([
  ['qwen3', ['qwen3_moe', 'glm4_moe']], // norms on q and k
  ['qwen2', ['qwen2_moe', 'glm4_moe']], // biases on q, k, v
  ['mistral', ['mixtral']], // a sliding window
] as const)('transformers computes %s from its containers with all experts on', async (name, containers) => {
  const plain = { use_sliding_window: false, layer_types: ['full_attention', 'full_attention'] };
  const input = archCase(name, { config: (config) => name === 'qwen2' && Object.assign(config, plain) });
  const outs: string[] = [];
  for (const container of containers) {
    const out = join(work, `${name}-${container}`);
    // Four parts of 12 neurons: transformers' grouped product wants rows of 16 bytes.
    const experts = container === 'qwen3_moe' || container === 'mixtral' ? 4 : 3;
    const text = { source: 'self' as const, samples: 32, seqLen: 32, seed: 0 };
    await runMoe({ input, out, method: 'split', container, experts, active: 2, rounds: 0, steps: 2, refit: false, calibration: text, tool, commandLine: 'test' }, env); // prettier-ignore
    outs.push(out);
  }
  const checked = await containersChecked(input, outs);
  expect(checked.map(({ model_type }) => model_type)).toEqual(containers);
});

describe.skipIf(!dense)('where routing is limited to groups, transformers computes our logits', () => {
  const louder = join(work, 'louder');
  const tokens = someTokens(48, 8192);

  test('from the mixture', async () => {
    const { logits } = await python<{ logits: number[] }>('check_moe.py', join(work, 'glm4_moe-3'), JSON.stringify([...tokens]), louder); // prettier-ignore
    expect(relativeError(logits, await ourLogits(louder, env, tokens))).toBeLessThan(1e-4);
  });

  test.each(['prune', 'merge'] as const)('%s: with fewer experts in each group', async (kind) => {
    const out = join(work, `louder-${kind}`);
    await runSurgery({ input: louder, out, kind, keep: 8, calibration, tool, commandLine: 'test' }, env);
    const { logits, names } = await python<{ logits: number[]; names: object }>('check_moe.py', out, JSON.stringify([...tokens])); // prettier-ignore
    expect(names).toEqual({});
    expect(relativeError(logits, await ourLogits(out, env, tokens))).toBeLessThan(1e-4);
  });

  test('quantized', async () => {
    const [root, tokenFile, logitFile] = [join(work, 'int4'), join(work, 'tokens.json'), join(work, 'logits.f32')];
    const out = join(root, 'compressed-tensors');
    const recipe = { ...defaultRecipe, groupSize: 32 };
    await quantize({ input: louder, out, recipe, formats: ['compressed-tensors'], calibration, tool, commandLine: 'test' }, env); // prettier-ignore
    writeFileSync(tokenFile, JSON.stringify([[...tokens]]));
    const { linears } = await python<{ linears: number }>('check_quantized.py', root, tokenFile, logitFile);
    expect(linears).toBeGreaterThan(3 * 16);
    const theirs = new Float32Array(readFileSync(logitFile).buffer.slice(0));
    expect(relativeError(theirs, await ourLogits(out, env, tokens))).toBeLessThan(1e-4);
  });
});

describe.each(['prune', 'merge'] as const)('%s', (kind) => {
  test('transformers computes our logits from moe-6m with fewer experts, and generates', async () => {
    const out = join(work, kind);
    await runSurgery({ input: fixture('moe-6m'), out, kind, keep: 4, calibration, tool, commandLine: 'test' }, env);
    const tokens = someTokens(48, 8192);
    const { logits, names, generated } = await python<{ logits: number[]; names: object; generated: number[] }>('check_moe.py', out, JSON.stringify([...tokens])); // prettier-ignore
    expect(names).toEqual({});
    expect(generated).toHaveLength(4);
    expect(relativeError(logits, await ourLogits(out, env, tokens))).toBeLessThan(1e-4);
  });
});
