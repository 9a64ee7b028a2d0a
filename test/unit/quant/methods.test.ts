import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { openModel } from '../../../src/arch/open.js';
import { WeightReader } from '../../../src/arch/weights.js';
import { quantize, type QuantizeOptions } from '../../../src/quant/run.js';
import { defaultRecipe, type Recipe } from '../../../src/quant/scheme.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { fixture, testEnv } from '../../arch/support.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const v1 = fixture('v1.0/v1.0_checkpoint.bin');
const text = fixture('samples.jsonl');

const run = (name: string, recipe: Partial<Recipe>, more: Partial<QuantizeOptions> = {}) =>
  quantize(
    {
      input: v1,
      out: join(folder, name),
      recipe: { ...defaultRecipe, ...recipe },
      formats: ['compressed-tensors'],
      calibration: { source: [text], samples: 4, seqLen: 32, seed: 0 },
      tool: { name: 'deepseek-convert', version: '0.0.0' },
      commandLine: 'deepseek-convert quantize',
      ...more,
    },
    env,
  );

/** Tensors of a model in f32, quantized ones as readers see them. */
async function values(path: string, names: readonly string[]): Promise<Float32Array[]> {
  const open = await openModel(path);
  try {
    using scope = new Scope(env.device);
    const reader = new WeightReader(open, env.device, 'f32');
    const found: Float32Array[] = [];
    for (const name of names) found.push(await (await reader.tensor(name, scope)).float32());
    return found;
  } finally {
    await open.close();
  }
}

/** |a - b| / |b| */
function distance(a: Float32Array, b: Float32Array): number {
  let [d, s] = [0, 0];
  b.forEach((value, i) => {
    d += (a[i]! - value) ** 2;
    s += value ** 2;
  });
  return Math.sqrt(d / s);
}

describe('bits, groups and zero points', () => {
  // Rounding to b bits by groups: about max / 2^(b - 1) / sqrt(12), max of the group some 2.8 standard deviations.
  const expected = { 2: 0.45, 3: 0.22, 4: 0.11, 8: 0.008 } as const;
  for (const bits of [2, 3, 8] as const) {
    it(`are stored and read back at ${bits} bits`, async () => {
      const result = await run(`bits${bits}`, { bits, method: 'rtn' }, { calibration: undefined! });
      expect(result.plan.totals.bitsPerWeight).toBeCloseTo(bits + 16 / 128, 9);
      const name = 'model.layers.1.mlp.up_proj.weight';
      const [[was], [is]] = [await values(v1, [name]), await values(join(folder, `bits${bits}`), [name])];
      expect(distance(is!, was!)).toBeLessThan(expected[bits]);
      expect(distance(is!, was!)).toBeGreaterThan(expected[bits] / 8);
    });
  }

  it('may be one scale a row, with a zero point', async () => {
    const channel = await run('channel', { groupSize: -1 });
    expect(channel.plan.totals.bitsPerWeight).toBeLessThan(4.08);
    const asym = await run('asym', { symmetric: false });
    expect(asym.plan.totals.bitsPerWeight).toBeCloseTo(4 + 20 / 128, 9);
    const errors = [channel, asym].map(({ blocks }) => blocks.flatMap(({ linears }) => linears.map((l) => l.error)));
    const mean = (x: readonly number[]) => x.reduce((a, b) => a + b, 0) / x.length;
    expect(mean(errors[1]!)).toBeLessThan(mean(errors[0]!));
  });

  it('may differ by name: fused partners follow, and the report says so', async () => {
    const overrides = [{ pattern: 'down_proj', bits: 8 as const }, { pattern: 'layers.0.self_attn.k_proj', groupSize: 64 }]; // prettier-ignore
    const { blocks } = await run('override', { overrides });
    const scheme = new Map(blocks.flatMap(({ linears }) => linears.map((l) => [l.name, l.scheme])));
    expect(scheme.get('model.layers.2.mlp.down_proj')).toBe('int8 g128 symmetric');
    expect(scheme.get('model.layers.0.self_attn.v_proj')).toBe('int4 g64 symmetric');
    expect(scheme.get('model.layers.1.self_attn.v_proj')).toBe('int4 g128 symmetric');
  });
});

describe('--target-bpw', () => {
  it('keeps to the target with the schemes that measured errors ask for', async () => {
    const result = await run('bpw', { targetBpw: 4.7 });
    const { bitsPerWeight } = result.plan.totals;
    expect(bitsPerWeight).toBeLessThanOrEqual(4.7);
    expect(bitsPerWeight).toBeGreaterThan(4.4);
    const schemes = new Set(result.blocks.flatMap(({ linears }) => linears.map((l) => l.scheme)));
    expect(schemes.size).toBeGreaterThan(1);
    for (const { linears } of result.blocks) {
      const of = (part: string) => new Set(linears.filter(({ name }) => name.includes(part)).map((l) => l.scheme));
      expect(of('self_attn.o').size).toBe(1);
      expect(new Set(['q', 'k', 'v'].flatMap((x) => [...of(`self_attn.${x}_`)])).size).toBe(1);
      expect(new Set(['gate', 'up'].flatMap((x) => [...of(`mlp.${x}_`)])).size).toBe(1);
    }
    const open = await openModel(join(folder, 'bpw'));
    await open.close();
  });
});

describe('awq', () => {
  it('moves scales into the norms, and the model stays what it was', async () => {
    const { blocks } = await run('awq8', { method: 'awq', bits: 8 });
    const scaled = blocks.flatMap(({ linears }) => linears.filter(({ note }) => note?.includes('scaled by')));
    expect(scaled.length).toBeGreaterThan(4);
    for (const { name } of scaled) {
      const layer = /^(model\.layers\.\d+)\./.exec(name)![1]!;
      const norm = `${layer}.${name.includes('self_attn') ? 'input' : 'post_attention'}_layernorm.weight`;
      const before = await values(v1, [norm, `${name}.weight`]);
      const after = await values(join(folder, 'awq8'), [norm, `${name}.weight`]);
      expect(distance(after[0]!, before[0]!), norm).toBeGreaterThan(0.01);
      // W diag(norm): what the norm's input meets.
      const meets = ([n, w]: readonly Float32Array[]) => w!.map((value, i) => value * n![i % n!.length]!);
      expect(distance(meets(after), meets(before)), name).toBeLessThan(0.02);
    }
  });

  it('beats rounding on the same grids, and error feedback on top beats it', async () => {
    const error = async (name: string, method: Recipe['method']) => {
      const { blocks } = await run(name, { method });
      const linears = blocks.flatMap((block) => block.linears).filter((l) => /(q|gate)_proj/.test(l.name));
      return linears.map((l) => l.error);
    };
    const [rtn, awq, both] = [await error('rtn', 'rtn'), await error('awq', 'awq'), await error('both', 'awq-gptq')];
    // The first layer's inputs are the same in all three.
    expect(awq[0]!).toBeLessThanOrEqual(rtn[0]!);
    expect(awq[1]!).toBeLessThanOrEqual(1.001 * rtn[1]!);
    const total = (x: readonly number[]) => x.reduce((sum, value) => sum + value, 0);
    expect(total(awq)).toBeLessThan(total(rtn));
    expect(total(both)).toBeLessThan(0.8 * total(awq));
  }, 180_000);

  it('is refused where norms cannot take up scales', async () => {
    await expect(run('no', { method: 'awq' }, { formats: ['gguf'] })).rejects.toThrow(/does not go together/);
    expect(existsSync(join(folder, 'no.part'))).toBe(false);
  });
});

describe('--calibrate-all-experts', () => {
  it('leaves no expert without statistics, and nothing starved', async () => {
    const calibration = { source: [text], samples: 1, seqLen: 2, seed: 0 };
    const more = { input: fixture('moe-6m'), calibration, calibrateAllExperts: true };
    const { blocks } = await run('all', {}, more);
    const experts = blocks.flatMap(({ linears }) => linears.filter(({ name }) => name.includes('.experts.')));
    expect(experts.length).toBe(3 * 8 * 3);
    for (const { tokens, note, method } of experts) {
      expect(tokens).toBe(2);
      expect(method).toBe('gptq');
      expect(note ?? '').not.toMatch(/drawn|no calibration token/);
    }
    for (const { coverage } of blocks) {
      if (coverage) expect(coverage).toMatchObject({ uncovered: 0, starved: 0, calibratedOnAll: true });
    }
  });
});
