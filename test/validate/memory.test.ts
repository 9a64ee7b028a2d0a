import { closeSync, cpSync, mkdirSync, openSync, readSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { compareModels } from '../../src/validate/sides.js';
import { writeTensors, type StoredTensor } from '../cli/files.js';
import { damage, dense, env, useModels } from './models.js';

useModels();

/** dense-6m with its four layers again and again. */
async function deepen(layers: number): Promise<{ path: string; blockBytes: number; outerBytes: number }> {
  const path = join(damage.folder, `deep-${layers}`);
  mkdirSync(path);
  cpSync(join(dirname(dense), 'tokenizer.json'), join(path, 'tokenizer.json'));
  const open = await openModel(dense);
  const tensors = new Map<string, StoredTensor>();
  let [blockBytes, outerBytes] = [0, 0];
  for (const [name, { span, shape }] of open.checkpoint.tensors) {
    const data = new Uint8Array(span.bytes);
    const file = openSync(span.path, 'r');
    readSync(file, data, 0, span.bytes, span.offset);
    closeSync(file);
    const layer = /^model\.layers\.(\d)\./.exec(name)?.[1];
    // In fp32, as they are held.
    if (layer === '0') blockBytes += 2 * span.bytes;
    if (layer === undefined) outerBytes += 2 * span.bytes;
    const first = Number(layer ?? 0);
    for (let l = first; l < (layer === undefined ? 1 : layers); l += 4) {
      tensors.set(name.replace(/layers\.\d/, `layers.${l}`), { dtype: 'BF16', shape, data });
    }
  }
  writeTensors(join(path, 'model.safetensors'), tensors);
  writeFileSync(join(path, 'config.json'), JSON.stringify({ ...open.checkpoint.config, num_hidden_layers: layers }));
  await open.close();
  return { path, blockBytes, outerBytes };
}

/** Most bytes that were in use at once, while a model was compared with itself. */
async function peakOf(path: string, windows: number): Promise<number> {
  const [a, b] = [await openModel(path), await openModel(path)];
  const tokens = Int32Array.from({ length: windows * 64 }, (_, i) => (i * 37) % 8000);
  try {
    env.device.resetPeak();
    const options = { dtype: 'f32', resamples: 100, seed: 0, batchTokens: 128 } as const;
    const { logits } = await compareModels(a, b, [{ name: 'text', tokens, n: windows, length: 64, sha256: '' }], options, env); // prettier-ignore
    expect(logits.kl.max).toBe(0);
    return env.device.memory().peak;
  } finally {
    await Promise.all([a.close(), b.close()]);
  }
}

describe('memory of a comparison', () => {
  it('holds two blocks of each model at most, however deep it is; all is free at the end', async () => {
    const [shallow, deep] = [await deepen(4), await deepen(24)];
    const before = env.device.memory().used;
    // How far the read of the next block has come while one computes differs from run to run: the least of six.
    const least = async (path: string) => {
      let peak = Infinity;
      for (let i = 0; i < 6; i++) peak = Math.min(peak, await peakOf(path, 2));
      return peak;
    };
    const [few, many] = [await least(shallow.path), await least(deep.path)];
    expect(env.device.memory().used).toBe(before);
    expect(Math.abs(many - few)).toBeLessThan(0.05 * deep.blockBytes);
    // This block and the next of both; activations of 128 tokens are little beside them.
    expect(many).toBeLessThan(Math.max(4 * deep.blockBytes, 2 * deep.outerBytes) + 16e6);
    expect(many).toBeLessThan(0.5 * 24 * deep.blockBytes);
  }, 240_000);

  it('grows with the text by the two streams of hidden states alone', async () => {
    const { path } = await deepen(8);
    const [few, many] = [await peakOf(path, 4), await peakOf(path, 24)];
    const states = 20 * 64 * 256 * 4; // 20 windows more, 64 tokens, 256 channels, fp32
    expect(many - few).toBeGreaterThan(1.9 * states);
    expect(many - few).toBeLessThan(2.5 * states);
  }, 240_000);
});
