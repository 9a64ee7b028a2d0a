import { createHash } from 'node:crypto';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { Job } from '../../../src/base/job.js';
import { openModel } from '../../../src/arch/open.js';
import { WeightReader } from '../../../src/arch/weights.js';
import { openCheckpoint } from '../../../src/checkpoint/open.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { quantize, type QuantizeOptions } from '../../../src/quant/run.js';
import { defaultRecipe } from '../../../src/quant/scheme.js';
import { verifyFolder } from '../../../src/quant/verify.js';
import { fixture, shared, testEnv } from '../../arch/support.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const v1 = fixture('v1.0/v1.0_checkpoint.bin');
const text = fixture('samples.jsonl');

const job = (name: string, more: Partial<QuantizeOptions> = {}): QuantizeOptions => ({
  input: v1,
  out: join(folder, name),
  recipe: defaultRecipe,
  formats: ['compressed-tensors'],
  calibration: { source: [text], samples: 8, seqLen: 64, seed: 0 },
  tool: { name: 'deepseek-convert', version: '0.0.0' },
  commandLine: 'deepseek-convert quantize',
  ...more,
});

const hash = (bytes: Uint8Array): string => createHash('sha256').update(bytes).digest('hex');
const weightsHash = (name: string): string => hash(readFileSync(join(folder, name, 'model.safetensors')));

/** Bytes of a stored tensor, without our readers of layouts. */
async function stored(name: string): Promise<Map<string, Buffer>> {
  const file = readFileSync(join(folder, name, 'model.safetensors'));
  const checkpoint = await openCheckpoint(join(folder, name));
  return new Map(
    [...checkpoint.tensors].map(([key, { span }]) => [key, file.subarray(span.offset, span.offset + span.bytes)]),
  );
}

/** Codes times scales from the stored bytes alone: pack-quantized, symmetric, 4 bits. */
function unpackWeight(tensors: ReadonlyMap<string, Buffer>, name: string): Float32Array {
  const get = (suffix: string) => tensors.get(`${name}.weight_${suffix}`)!;
  const shape = get('shape');
  const [n, k] = [Number(shape.readBigInt64LE(0)), Number(shape.readBigInt64LE(8))];
  const [packed, scale] = [get('packed'), get('scale')];
  const groups = scale.length / 2 / n;
  const value = new DataView(new ArrayBuffer(4));
  return Float32Array.from({ length: n * k }, (_, i) => {
    const [row, column] = [Math.floor(i / k), i % k];
    const word = packed.readUInt32LE(4 * (row * (k / 8) + Math.floor(column / 8)));
    const code = ((word >>> (4 * (column % 8))) & 15) - 8;
    value.setUint32(0, scale.readUInt16LE(2 * (row * groups + Math.floor(column / (k / groups)))) << 16);
    return code * value.getFloat32(0);
  });
}

describe('plain rounding', () => {
  it('stores what numpy stores', async () => {
    const search = { points: 1, from: 1, to: 1, freeSign: false };
    const { calibration: _, ...options } = job('plain', { recipe: { ...defaultRecipe, method: 'rtn', search } });
    const result = await quantize(options, env);
    expect(result.verified).toBe(28);
    const expected = JSON.parse(readFileSync(fixture('quant/rounding.json'), 'utf8')) as Record<
      string,
      Record<string, string>
    >;
    const tensors = await stored('plain');
    expect(Object.keys(expected)).toHaveLength(28);
    for (const [name, { packed, scale }] of Object.entries(expected)) {
      expect(hash(tensors.get(`${name}.weight_packed`)!), name).toBe(packed);
      expect(hash(tensors.get(`${name}.weight_scale`)!), name).toBe(scale);
    }
    for (const { error, plainError } of result.blocks.flatMap(({ linears }) => linears)) expect(error).toBe(plainError);
  });
});

describe('gptq', () => {
  it('writes a model that reads back, copies the rest, and reports its errors', async () => {
    const result = await quantize(job('gptq'), env);
    expect(existsSync(`${join(folder, 'gptq')}.part`)).toBe(false);
    expect(result.verified).toBe(28);
    const linears = result.blocks.flatMap((block) => block.linears);
    for (const { name, error, plainError, tokens } of linears) {
      expect(error, name).toBeLessThan(plainError);
      expect(error, name).toBeGreaterThan(0);
      expect(tokens).toBe(512);
    }
    const [source, output] = [await openModel(v1), await openModel(join(folder, 'gptq'))];
    const bytes = await stored('gptq');
    using scope = new Scope(env.device);
    const [before, after] = [new WeightReader(source, env.device, 'f32'), new WeightReader(output, env.device, 'f32')];
    for (const { name } of linears) {
      const [w, q] = [await before.tensor(`${name}.weight`, scope), await after.tensor(`${name}.weight`, scope)];
      const [a, b] = [await w.float32(), await q.float32()];
      expect(b, name).toEqual(unpackWeight(bytes, name));
      const squares = (values: Float32Array) => values.reduce((sum, v) => sum + v * v, 0);
      const ratio = squares(a.map((v, i) => v - b[i]!)) / squares(a);
      expect(ratio, name).toBeGreaterThan(1e-4);
      expect(ratio, name).toBeLessThan(0.04);
      scope.free(w, q);
    }
    for (const [name, { span, encoding, shape }] of source.checkpoint.tensors) {
      if (name.includes('_proj')) continue;
      const entry = output.checkpoint.tensors.get(name)!;
      expect(entry.encoding).toEqual(encoding);
      expect(entry.shape).toEqual(shape);
      const original = readFileSync(span.path).subarray(span.offset, span.offset + span.bytes);
      expect(bytes.get(name)!.equals(original), name).toBe(true);
    }
    const config = output.checkpoint.config as { quantization_config: { ignore: string[] } };
    expect(config.quantization_config.ignore).toEqual(['lm_head']);
    const provenance = JSON.parse(readFileSync(join(folder, 'gptq/deepseek-convert.json'), 'utf8')) as {
      linears: { name: string; error: number }[];
      leftInHighPrecision: unknown[];
      recipe: { calibration: { text: string } };
    };
    expect(provenance.linears).toHaveLength(28);
    expect(provenance.leftInHighPrecision).toHaveLength(1);
    expect(provenance.recipe.calibration.text).toMatch(/^[0-9a-f]{64}$/);
    expect(readFileSync(join(folder, 'gptq/README.md'), 'utf8')).toMatch(/int4 g128 symmetric: 28 linears/);
    await Promise.all([source.close(), output.close()]);
  });

  it('gives the same bytes when states do not fit and the block is recomputed from call to call', async () => {
    await quantize(job('tight', { budget: 1 }), env);
    expect(weightsHash('tight')).toBe(weightsHash('gptq'));
  });

  it('gives other bytes for other batches only within rounding, and records them in the fingerprint', async () => {
    const result = await quantize(job('batches', { batchRows: 3 }), env);
    const mean = (of: typeof result) =>
      of.blocks.flatMap((b) => b.linears).reduce((sum, { error }) => sum + error, 0) / 28;
    const again = await quantize(job('again'), env);
    expect(weightsHash('again')).toBe(weightsHash('gptq'));
    expect(mean(result) / mean(again)).toBeGreaterThan(0.98);
    expect(mean(result) / mean(again)).toBeLessThan(1.02);
  });

  it('feels what it did: later blocks see quantized ones', async () => {
    // Were errors not propagated, block 3 would be calibrated on the same inputs whatever became of block 0.
    const kept = await quantize(job('kept', { keep: ['layers.0', 'layers.1', 'layers.2'] }), env);
    const full = await quantize(job('again2'), env);
    const last = (of: typeof full) => of.blocks[3]!.linears.find(({ name }) => name.endsWith('o_proj'))!;
    expect(last(kept).error).not.toBe(last(full).error);
    expect(kept.plan.totals.left).toBe(22);
  });

  it('works on a single token', async () => {
    const result = await quantize(job('one', { calibration: { source: [text], samples: 1, seqLen: 1, seed: 0 } }), env);
    for (const { error, plainError } of result.blocks.flatMap(({ linears }) => linears)) {
      expect(Number.isFinite(error)).toBe(true);
      expect(error).toBeLessThanOrEqual(plainError);
    }
  });
});

describe('padded widths', () => {
  it('change nothing but the shape', async () => {
    const path = shared('models', 'stories260k');
    if (!existsSync(path)) return console.warn('skipped: ../shared/models/stories260k is not there');
    const result = await quantize(job('padded', { input: path }), env);
    expect(result.verified).toBe(35);
    const [source, output] = [await openModel(path), await openModel(join(folder, 'padded'))];
    expect(output.checkpoint.config.intermediate_size).toBe(192);
    using scope = new Scope(env.device);
    const reader = new WeightReader(output, env.device, 'f32');
    const w = await (await reader.tensor('model.layers.2.mlp.down_proj.weight', scope)).float32();
    const up = await (await reader.tensor('model.layers.2.mlp.up_proj.weight', scope)).float32();
    for (let row = 0; row < 64; row++)
      expect(w.subarray(row * 192 + 172, (row + 1) * 192).every((v) => v === 0)).toBe(true);
    expect(up.subarray(172 * 64).every((v) => v === 0)).toBe(true);
    expect(up.subarray(0, 172 * 64).filter((v) => v !== 0).length).toBeGreaterThan(9000);
    await Promise.all([source.close(), output.close()]);
  });
});

describe('mixtures of experts', () => {
  const moe = { input: fixture('moe-6m'), calibration: { source: [text], samples: 8, seqLen: 64, seed: 0 } };

  it('quantize routed experts, and say how many tokens each saw', async () => {
    const result = await quantize(job('moe', { ...moe, scope: 'all' }), env);
    const layers = result.blocks.flatMap(({ coverage }) => coverage ?? []);
    expect(layers).toHaveLength(3);
    for (const { tokens, experts, starved } of layers) {
      expect(tokens).toHaveLength(8);
      expect(experts).toBe(8);
      // 512 tokens, two experts each.
      expect(tokens.reduce((a, b) => a + b, 0)).toBe(1024);
      expect(starved).toBe(tokens.filter((count) => count < 384).length);
    }
    const linears = result.blocks.flatMap((block) => block.linears);
    for (const { name, error, plainError, tokens, note } of linears) {
      expect(error, name).toBeLessThanOrEqual(plainError);
      if (!name.includes('.experts.')) continue;
      expect(note !== undefined, name).toBe(tokens < (name.endsWith('down_proj') ? 256 : 384));
    }
    expect(result.verified).toBe(linears.length);
    const output = await openModel(join(folder, 'moe'));
    await output.close();
  });

  it('fail when too many experts saw nothing, and say what to do', async () => {
    const few = { ...moe, calibration: { source: [text], samples: 1, seqLen: 2, seed: 0 } };
    await expect(quantize(job('few', few), env)).rejects.toMatchObject({ kind: 'gate' });
    expect(existsSync(join(folder, 'few'))).toBe(false);
    const result = await quantize(job('few2', { ...few, maxUncovered: 1 }), env);
    const unseen = result.blocks.flatMap((b) => b.linears).filter(({ tokens }) => tokens === 0);
    expect(unseen.length).toBeGreaterThan(10);
    for (const { method, note } of unseen) {
      expect(method).toBe('rtn');
      expect(note).toMatch(/no calibration token reached/);
    }
  });
});

describe('verification', () => {
  it('finds a single changed code', async () => {
    const result = await quantize(job('changed'), env);
    const config = JSON.parse(readFileSync(join(folder, 'changed/config.json'), 'utf8')) as Record<string, unknown>;
    const probes = new Map(result.blocks.flatMap((b) => b.linears).map(({ name, probe }) => [name, probe] as const));
    const check = () => verifyFolder(join(folder, 'changed'), config, result.plan, probes, env);
    expect(await check()).toBe(28);
    const checkpoint = await openCheckpoint(join(folder, 'changed'));
    const { span } = checkpoint.tensors.get('model.layers.2.mlp.up_proj.weight_packed')!;
    const { open } = await import('node:fs/promises');
    const file = await open(span.path, 'r+');
    const byte = Buffer.alloc(1);
    await file.read(byte, 0, 1, span.offset + 1000);
    byte[0]! ^= 1;
    await file.write(byte, 0, 1, span.offset + 1000);
    await file.close();
    await expect(check()).rejects.toThrow(/model\.layers\.2\.mlp\.up_proj/);
  });
});

describe('a job that was killed after its output got its name', () => {
  it('only clears its work folder', async () => {
    const spy = vi.spyOn(Job.prototype, 'remove').mockImplementation(function (this: Job) {
      return this.close();
    });
    const first = await quantize(job('named'), env).finally(() => spy.mockRestore());
    expect(existsSync(join(folder, 'named.part'))).toBe(true);
    const before = readFileSync(join(folder, 'named/model.safetensors'));
    const result = await quantize(job('named'), env);
    expect(result.blocks).toEqual(first.blocks);
    expect(existsSync(join(folder, 'named.part'))).toBe(false);
    expect(readFileSync(join(folder, 'named/model.safetensors')).equals(before)).toBe(true);
  });
});

describe('bad input', () => {
  it('is refused before any work, and leaves nothing', async () => {
    await expect(quantize(job('x.bin'), env)).rejects.toMatchObject({ kind: 'usage' });
    await expect(quantize(job('gptq'), env)).rejects.toThrow(/exists already/);
    await expect(quantize(job('no', { calibration: { source: ['nowhere.txt'], samples: 1, seed: 0 } }), env)).rejects.toThrow(/nowhere\.txt/); // prettier-ignore
    await expect(quantize(job('no', { calibration: { source: [text], samples: 1, seqLen: 4096, seed: 0 } }), env)).rejects.toThrow(/--seq-len/); // prettier-ignore
    for (const name of ['no', 'no.part', 'x.bin']) expect(existsSync(join(folder, name))).toBe(false);
  });
});
