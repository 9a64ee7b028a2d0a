import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { openModel } from '../../../src/arch/open.js';
import { ResidentModel } from '../../../src/arch/resident.js';
import { containerNames } from '../../../src/moe/containers/index.js';
import type { ContainerName } from '../../../src/moe/containers/types.js';
import { runMoe } from '../../../src/moe/run.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { archCase, fixture, relativeError, testEnv, trainedModel } from '../../arch/support.js';

vi.setConfig({ testTimeout: 300_000 });
const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'moe-containers-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Every dense architecture that has a container, with the ones that hold its attention; the others refuse it. */
const sources: [name: string, holds: ContainerName[]][] = [
  ['llama', ['glm4_moe', 'qwen2_moe', 'mixtral']],
  ['llama-llama3', ['glm4_moe', 'qwen2_moe', 'mixtral']],
  ['llama-yarn', ['glm4_moe', 'qwen2_moe', 'mixtral']],
  ['llama-linear', ['glm4_moe', 'qwen2_moe', 'mixtral']],
  ['mistral', ['mixtral']], // a sliding window
  ['qwen2', ['glm4_moe', 'qwen2_moe']], // biases on q, k, v
  ['qwen3', ['glm4_moe', 'qwen3_moe']], // norms on q and k
];

const logitsOf = async (path: string, tokens: Int32Array): Promise<Float32Array> => {
  const open = await openModel(path);
  using model = await ResidentModel.load(open, env, 'f32');
  using scope = new Scope(env.device);
  const logits = await model.logits(scope, model.hidden(scope, tokens, 1)).float32();
  await open.close();
  return logits;
};

const split = (input: string, out: string, container: ContainerName, source: 'self' | string[] = 'self') =>
  runMoe(
    {
      input,
      out: join(folder, out),
      method: 'split',
      container,
      experts: 4,
      active: 4,
      calibration: { source, samples: 32, seqLen: 32, seed: 0 },
      rounds: 0,
      steps: 2,
      tool: { name: 'deepseek-convert', version: '0.0.0' },
      commandLine: 'deepseek-convert moe',
    },
    env,
  );

describe.each(sources)('%s', (name, holds) => {
  const input = archCase(name, { config: (config) => name === 'qwen2' && (config.use_sliding_window = false) });
  it.each(containerNames)('in %s', async (container) => {
    const out = `${name}-${container}`;
    if (!holds.includes(container)) {
      await expect(split(input, out, container)).rejects.toThrow(`The container ${container} cannot hold this model`);
      return;
    }
    // Four experts beside a shared one: 48 neurons in parts of 12 (10 and padding with five of them).
    const report = await split(input, out, container);
    expect(report.exactness!.output.relative).toBeLessThan(1e-4);
    const tokens = Int32Array.from({ length: 48 }, (_, i) => (i * 37 + 5) % 64);
    expect(relativeError(await logitsOf(report.out, tokens), await logitsOf(input, tokens))).toBeLessThan(1e-4);
  });
});

const ownText = [fixture('samples.jsonl')];
describe.each<[string, 'self' | string[]]>([
  ['dense-32m', ownText],
  ['stories260k', 'self'],
])('trained %s', (name, text) => {
  const input = trainedModel(name);
  it.skipIf(input === undefined)('is the dense model in every container that holds it', async () => {
    const tokens = Int32Array.from({ length: 48 }, (_, i) => (i * 37 + 5) % 500);
    const dense = await logitsOf(input!, tokens);
    for (const container of ['glm4_moe', 'qwen2_moe', 'mixtral'] as const) {
      const report = await split(input!, `${name}-${container}`, container, text);
      expect(report.exactness!.output.relative, container).toBeLessThan(1e-4);
      expect(relativeError(await logitsOf(report.out, tokens), dense), container).toBeLessThan(1e-4);
    }
  });
});
