import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { OpenFiles } from '../../src/arch/files.js';
import { weightStatistics, type ChannelStatistics, type Statistics } from '../../src/arch/statistics.js';
import { storedWeights } from '../../src/arch/stored.js';
import { openCheckpoint } from '../../src/checkpoint/open.js';
import { parseFile } from '../../src/checkpoint/parse.js';
import type { TensorEntry } from '../../src/checkpoint/types.js';
import { fixture, testEnv } from './support.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'statistics-'));
afterAll(() => rmSync(folder, { recursive: true }));

async function statisticsOf(path: string, atOnce?: number): Promise<Statistics> {
  const files = new OpenFiles();
  try {
    const tensors = storedWeights(await tensorsOf(path), undefined);
    return await weightStatistics({ tensors, file: (file) => files.get(file) }, env, atOnce);
  } finally {
    await files.close();
  }
}

async function tensorsOf(path: string): Promise<ReadonlyMap<string, TensorEntry>> {
  // The GGUF file of all types is no model.
  if (path.endsWith('.gguf')) return new Map((await parseFile(path)).tensors.map((entry) => [entry.name, entry]));
  const checkpoint = await openCheckpoint(path, { configOptional: true });
  await checkpoint.close();
  return checkpoint.tensors;
}

/** fixtures/moe-6m with the changes that fixtures/make_statistics.py makes. */
async function planted(): Promise<string> {
  const path = join(folder, 'model.safetensors');
  cpSync(fixture('moe-6m/model.safetensors'), path);
  const bytes = readFileSync(path);
  const tensors = await tensorsOf(path);
  /** The bf16 values of a matrix, as they lie in the file. */
  const edit = (name: string, change: (value: number, row: number, column: number) => number) => {
    const { span, shape } = tensors.get(name)!;
    for (let i = 0; i < span.bytes / 2; i++) {
      const at = span.offset + 2 * i;
      const value = new Float32Array(Uint32Array.of(bytes.readUInt16LE(at) << 16).buffer)[0]!;
      const changed = change(value, Math.floor(i / shape[1]!), i % shape[1]!);
      bytes.writeUInt16LE(new Uint32Array(Float32Array.of(changed).buffer)[0]! >>> 16, at);
    }
  };
  edit('model.layers.1.self_attn.o_proj.weight', (value, row, column) => {
    if (row === 3) return 0;
    if (row === 9 && column === 0) return -Infinity;
    return row === 5 && (column === 7 || column === 8) ? (column === 7 ? Infinity : NaN) : value;
  });
  edit('model.layers.2.mlp.experts.3.up_proj.weight', (value, _, column) => (column === 17 ? value * 16 : value));
  edit('model.layers.3.self_attn.kv_b_proj.weight', (value, row) => (row === 40 ? value * 32 : value));
  writeFileSync(path, bytes);
  return path;
}

interface Channels {
  dead: number;
  median: number;
  outliers: number;
  worst: number;
  ratio: number;
}
type Expected = Record<'mean' | 'std' | 'absmax' | 'zeros' | 'nonFinite', number> & {
  output: Channels;
  input?: Channels;
};

describe('statistics of weights', () => {
  it('are what PyTorch computes: means, zeros, values that are not finite, outlier channels', async () => {
    const { tensors: wanted } = JSON.parse(readFileSync(fixture('statistics.json'), 'utf8')) as { tensors: Record<string, Expected> }; // prettier-ignore
    const { tensors, skipped } = await statisticsOf(await planted());
    expect(skipped).toEqual([]);
    expect(tensors).toHaveLength(129);
    const found = new Map(tensors.map((t) => [t.name, t]));
    for (const [name, { output, input, mean, std, absmax, ...counts }] of Object.entries(wanted)) {
      const own = found.get(name)!;
      expect(own, name).toMatchObject({ ...counts, absmax });
      expect(Math.abs(own.mean! - mean), name).toBeLessThan(1e-6 * absmax);
      expect(Math.abs(own.std! - std) / std, name).toBeLessThan(1e-5);
      expect(own.channels.map(({ of }) => of)).toEqual(input ? ['output', 'input'] : ['output']);
      const same = (channels: ChannelStatistics, { worst, ratio, ...numbers }: Channels) => {
        expect(channels, name).toMatchObject(numbers);
        expect(channels.worst.length > 0, name).toBe(numbers.outliers > 0);
        if (channels.worst.length > 0) expect(channels.worst[0]!.index, name).toBe(worst);
        if (channels.worst.length > 0) expect(channels.worst[0]!.ratio, name).toBeCloseTo(ratio, 9);
      };
      same(own.channels[0]!, output);
      if (input) same(own.channels[1]!, input);
    }
    const loud = tensors.filter(({ channels }) => channels.some(({ outliers }) => outliers > 0)).map(({ name }) => name); // prettier-ignore
    expect(loud).toEqual(expect.arrayContaining(['model.layers.2.mlp.experts.3.up_proj.weight', 'model.layers.3.self_attn.kv_b_proj.weight'])); // prettier-ignore
  });

  it.each([
    'formats/scaled/scaled.safetensors',
    'formats/gguf/all-types.gguf',
    'formats/torch/plain.bin',
    'moe-6m/model.safetensors',
  ])('%s: some rows at a time give the same as all at once', async (path) => {
    const [whole, pieces] = [
      await statisticsOf(fixture(path)),
      await statisticsOf(fixture(path), path.startsWith('moe') ? 20_000 : 700),
    ];
    expect(whole.tensors.length).toBeGreaterThan(0);
    expect(pieces.skipped).toEqual(whole.skipped);
    for (const [i, { mean, std, ...rest }] of pieces.tensors.entries()) {
      const other = whole.tensors[i]!;
      expect(other).toMatchObject(rest);
      expect(mean).toBeCloseTo(other.mean!, 6);
      expect(std).toBeCloseTo(other.std!, 6);
    }
  });
});
