import { open, readFile, writeFile } from 'node:fs/promises';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it, vi } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { runMoe } from '../../src/moe/run.js';
import { gateFailure, runValidate, type ValidateOptions } from '../../src/validate/run.js';
import type { ValidateReport } from '../../src/validate/report.js';
import { damage, dense, env, fixture, moe, scaleBy, shared, toBits, toNumber, useModels, type Edit } from './models.js';

// Each test compares whole models: seconds on a free machine, more beside other work.
vi.setConfig({ testTimeout: 240_000 });

useModels();

const validate = (reference: string, candidate: string, more: Partial<ValidateOptions> = {}): Promise<ValidateReport> =>
  runValidate(
    {
      reference,
      candidate,
      texts: [fixture('samples.jsonl')],
      samples: 4,
      seqLen: 80,
      generations: 0,
      resamples: 100,
      ...more,
    },
    env,
  );

const failed = (report: ValidateReport): string[] =>
  report.gates.filter(({ status }) => status === 'fail').map(({ id }) => id);
const gate = (report: ValidateReport, id: string) => report.gates.find((g) => g.id === id)!;

const zero: Edit = (bits) => bits.fill(0);
/** Rows of some heads change places. */
const swapRows =
  (a: number, b: number, rows: number): Edit =>
  (bits, [, width]) => {
    const span = rows * width!;
    const first = bits.slice(a * span, (a + 1) * span);
    bits.copyWithin(a * span, b * span, (b + 1) * span);
    bits.set(first, b * span);
  };
/** Two bits a weight, groups of 128, by the largest value: what nobody should ship. */
const twoBits: Edit = (bits) => {
  for (let from = 0; from < bits.length; from += 128) {
    const group = bits.subarray(from, from + 128);
    const scale = group.reduce((m, b) => Math.max(m, Math.abs(toNumber(b))), 0) / 2;
    group.forEach((b, i) => {
      const code = Math.min(1, Math.max(-2, Math.round(toNumber(b) / scale)));
      group[i] = toBits(code * scale);
    });
  }
};
const edited =
  (folder: string, file: string, change: (config: Record<string, Record<string, unknown>>) => void) =>
  async (): Promise<void> => {
    const path = join(damage.folder, folder, file);
    const config = JSON.parse(await readFile(path, 'utf8')) as Record<string, Record<string, unknown>>;
    change(config);
    await writeFile(path, JSON.stringify(config));
  };
const none: Edit = () => undefined;

describe('what is intact passes', () => {
  it.each([
    ['dense', dense],
    ['MoE', moe],
  ])('%s against itself: every number is perfect', async (_, model) => {
    const report = await validate(model, model, { profile: 'exact', generations: 3, newTokens: 12 });
    expect(failed(report)).toEqual([]);
    expect(report.passed).toBe(true);
    expect(report.diagnosis).toEqual([]);
    expect(report.logits).toMatchObject({
      kl: { mean: 0, max: 0 },
      top1: 1,
      flips: { rightToWrong: 0, wrongToRight: 0 },
    });
    expect(report.logits.perplexity.ratio).toBe(1);
    expect(report.logits.intervals).toEqual({ kl: { low: 0, high: 0 }, ratio: { low: 1, high: 1 } });
    for (const layer of report.layers)
      expect([layer.teacherForced, layer.freeRunning]).toEqual(Array(2).fill({ output: 0, update: 0 }));
    expect(report.attention!.layer0).toEqual({ expected: true, difference: 0 });
    expect(report.attention!.teacherForced.worst.divergence).toBeLessThan(1e-6);
    expect(report.attention!.freeRunning.mean).toMatchObject({ overlap: 1 });
    expect(report.weights).toMatchObject({ worst: [], unmatched: { reference: 0, candidate: 0 } });
    expect(report.weights!.identical).toBe(report.weights!.compared);
    expect(report.diversity!.distinctRatio.value).toBe(1);
    for (const pair of report.diversity!.pairs) expect(pair.candidate).toBe(pair.reference);
    if (model === moe) expect(report.routing!.mean.agreement).toBe(1);
    // Nothing was skipped but what this model does not have.
    expect(report.gates.filter(({ status }) => status === 'skipped').map(({ id }) => id)).toEqual([
      ...(model === moe ? [] : ['minRoutingAgreement', 'maxDeadExperts', 'maxLoadViolation']),
      'maxLateRepetition',
    ]);
    expect(gateFailure(report)).toBeUndefined();
  });

  it.each([
    ['dense', dense],
    ['MoE', moe],
  ])('a bit-exact copy of the %s model passes at the bounds of exact', async (name, model) => {
    const report = await validate(model, await damage.copy(model, `copy-${name}`, none), { profile: 'exact' });
    expect(failed(report)).toEqual([]);
    expect(report.weights!.identical).toBe(report.weights!.compared);
    expect(report.logits.kl.max).toBe(0);
  });

  it('gives the same report twice', async () => {
    const candidate = await damage.copy(dense, 'twice', { 'model.layers.1.mlp.up_proj.weight': scaleBy(1.1) });
    const run = (): Promise<ValidateReport> => validate(dense, candidate, { generations: 2, newTokens: 8 });
    expect(JSON.stringify(await run())).toBe(JSON.stringify(await run()));
  });

  it('an honest INT4 of 6 million parameters passes', async ({ skip }) => {
    const candidate = shared('models/dense-6m-int4-llmcompressor');
    if (!existsSync(candidate)) skip('../shared is not here');
    const texts = ['en-books', 'zh', 'wikitext2-raw-test'].map((name) => shared(`text/eval.${name}.txt`));
    const report = await validate(shared('models/dense-6m'), candidate, { texts, samples: 12, seqLen: 256 });
    expect(failed(report)).toEqual([]);
    expect(report.profile).toBe('quantized');
    expect(report.candidate.quantization).toBe('compressed-tensors');
  });
});

describe('planted faults are caught and named', () => {
  it("one layer's down_proj zeroed", async () => {
    const candidate = await damage.copy(dense, 'zeroed', { 'model.layers.2.mlp.down_proj.weight': zero });
    const report = await validate(dense, candidate);
    expect(failed(report)).toEqual(expect.arrayContaining(['maxKl', 'maxPplRatio', 'maxLayerError', 'maxWeightError']));
    expect(gate(report, 'maxLayerError')).toMatchObject({ layer: 2, where: 'layer 2 (model.layers.2)' });
    expect(gate(report, 'maxKl').where).toContain('layer 2 (model.layers.2)');
    expect(gate(report, 'maxWeightError').where).toBe('model.layers.2.mlp.down_proj.weight');
    expect(report.diagnosis[0]).toContain('Layer 2 (model.layers.2) stands out');
    const error = gateFailure(report)!;
    expect(error.exitCode).toBe(3);
    expect(error.message).toContain('model.layers.2');
    // The patterns of the layer itself are untouched: the fault is behind them.
    expect(report.attention!.teacherForced.divergence[2]!.every((d) => d < 1e-6)).toBe(true);
  });

  it('a swapped pair of heads', async () => {
    const candidate = await damage.copy(dense, 'swapped', {
      'model.layers.1.self_attn.q_proj.weight': swapRows(0, 1, 64),
    });
    const report = await validate(dense, candidate);
    expect(failed(report)).toEqual(expect.arrayContaining(['maxAttentionJs', 'maxHeadJs', 'maxWeightError']));
    expect(gate(report, 'maxAttentionJs')).toMatchObject({ layer: 1 });
    const row = report.attention!.teacherForced.divergence[1]!;
    expect(Math.min(row[0]!, row[1]!)).toBeGreaterThan(0.03);
    expect(Math.max(row[2]!, row[3]!)).toBeLessThan(1e-6);
    expect(gate(report, 'maxAttentionJs').where).toMatch(/^layer 1, head [01] /);
  });

  it('a scaled norm', async () => {
    const candidate = await damage.copy(dense, 'norm', { 'model.layers.3.input_layernorm.weight': scaleBy(1.6) });
    const report = await validate(dense, candidate);
    expect(failed(report)).toContain('maxWeightError');
    expect(gate(report, 'maxWeightError').where).toBe('model.layers.3.input_layernorm.weight');
    expect(gate(report, 'maxLayerError')).toMatchObject({ status: 'fail', layer: 3 });
    expect(gate(report, 'maxAttentionJs')).toMatchObject({ status: 'fail', layer: 3 });
  });

  it('another rope_theta: equal weights, unequal patterns', async () => {
    const change = edited('rope', 'v1.0_checkpoint.config.json', (config) => {
      (config.rope_parameters as { rope_theta: number }).rope_theta *= 100;
    });
    const report = await validate(dense, await damage.copy(dense, 'rope', none, change));
    expect(report.weights!.identical).toBe(report.weights!.compared);
    expect(gate(report, 'maxLayer0Change')).toMatchObject({ status: 'fail', layer: 0, where: 'layer 0' });
    expect(report.diagnosis[0]).toContain('the two configurations disagree');
  });

  it('two bits in one down_proj', async () => {
    const candidate = await damage.copy(dense, 'two-bits', { 'model.layers.1.mlp.down_proj.weight': twoBits });
    const report = await validate(dense, candidate);
    expect(gate(report, 'maxLayerError')).toMatchObject({ status: 'fail', layer: 1 });
    expect(gate(report, 'maxWeightError')).toMatchObject({
      status: 'fail',
      where: 'model.layers.1.mlp.down_proj.weight',
    });
  });

  it('one expert zeroed', async () => {
    const expert = 'model.layers.2.mlp.experts.5';
    const edits = Object.fromEntries(['gate', 'up', 'down'].map((part) => [`${expert}.${part}_proj.weight`, zero]));
    const report = await validate(moe, await damage.copy(moe, 'expert', edits));
    expect(failed(report)).toContain('maxWeightError');
    expect(gate(report, 'maxWeightError')).toMatchObject({ layer: 2 });
    expect(gate(report, 'maxWeightError').where).toContain(expert);
    expect(gate(report, 'maxLayerError').where).toContain('layer 2');
  });

  it('router rows out of order', async () => {
    const candidate = await damage.copy(moe, 'router', { 'model.layers.3.mlp.gate.weight': swapRows(1, 6, 1) });
    const report = await validate(moe, candidate);
    expect(failed(report)).toContain('minRoutingAgreement');
    expect(gate(report, 'minRoutingAgreement')).toMatchObject({ layer: 3, where: 'layer 3' });
  });

  it('token ids shifted', async () => {
    const change = edited('tokenizer', 'tokenizer.json', ({ model }) => {
      const { vocab } = model as { vocab: Record<string, number> };
      const [a, b] = ['Ġthe', 'Ġof'] as const;
      [vocab[a], vocab[b]] = [vocab[b]!, vocab[a]!];
    });
    const report = await validate(dense, await damage.copy(dense, 'tokenizer', none, change));
    expect(failed(report)).toEqual(['maxTokenMismatch']);
    expect(gate(report, 'maxTokenMismatch').where).toMatch(/samples\.jsonl.*token \d+: \d+ "Ġ(the|of)" against \d+/);
  });

  it('BPE dropout left on', async () => {
    const change = edited('dropout', 'tokenizer.json', ({ model }) => Object.assign(model ?? {}, { dropout: 0.1 }));
    const report = await validate(dense, await damage.copy(dense, 'dropout', none, change));
    expect(failed(report)).toContain('maxBpeDropout');
    expect(gate(report, 'maxBpeDropout')).toMatchObject({ value: 0.1, where: 'tokenizer.json of the candidate' });
  });

  it('a model that loops', async () => {
    const candidate = await damage.copy(dense, 'loops', { 'model.norm.weight': scaleBy(8) });
    const report = await validate(dense, candidate, { generations: 8, newTokens: 40 });
    expect(failed(report)).toEqual(expect.arrayContaining(['minDistinctRatio', 'maxRepIncrease']));
  });

  it('a model that collapses in long generations; the reference does not against itself', async () => {
    const candidate = await damage.copy(dense, 'collapses', { 'model.norm.weight': scaleBy(8) });
    const long = { longTokens: 300, samples: 2 };
    const report = await validate(dense, candidate, long);
    expect(report.stability).toMatchObject({ prompts: 4, newTokens: 300 });
    expect(failed(report)).toContain('maxLateRepetition');
    expect(gate(report, 'maxLateRepetition').where).toMatch(/^[1-4] of 4 generations collapsed$/);
    const same = await validate(dense, dense, long);
    expect(same.stability).toMatchObject({ collapsed: { reference: 0, candidate: 0 }, increase: { value: 0 } });
    expect(gate(same, 'maxLateRepetition')).toMatchObject({ status: 'pass', value: 0 });
  });
});

describe('dense against the mixture that we make of it', () => {
  let mixture: string;
  beforeAll(async () => {
    mixture = join(damage.folder, 'mixture');
    await runMoe(
      {
        input: dense,
        out: mixture,
        method: 'split',
        container: 'glm4_moe',
        experts: 8,
        active: 4,
        dense: 0,
        pad: 'auto',
        refit: true,
        calibration: { source: 'default', samples: 8, seqLen: 128, seed: 0 },
        rounds: 1,
        steps: 5,
        seed: 0,
        tool: { name: 'test', version: '0' },
        commandLine: 'test',
      },
      env,
    );
  });
  const texts: string[] = [];

  it('passes the gates for restructured models, and every part of it was measured', async () => {
    const report = await validate(dense, mixture, { texts, samples: 4, seqLen: 256 });
    expect(report.profile).toBe('restructured');
    expect(failed(report)).toEqual([]);
    // What it costs is real: half of the neurons are off for each token.
    expect(gate(report, 'maxKl').value).toBeGreaterThan(0.1);
    expect(gate(report, 'maxLayerError').value).toBeGreaterThan(0.2);
    // The attention is the dense model's: equal on the dense model's input, moved on its own stream.
    expect(gate(report, 'maxAttentionJs').value).toBeLessThan(1e-6);
    expect(gate(report, 'maxLayer0Change')).toMatchObject({ status: 'pass', value: 0 });
    expect(report.attention!.freeRunning.mean.divergence).toBeGreaterThan(1e-4);
    expect(report.routing!.layers.map(({ layer, active }) => [layer, active])).toEqual([0, 1, 2, 3].map((l) => [l, 4]));
    const skipped = report.gates.filter(({ status }) => status === 'skipped').map(({ id }) => id);
    expect(skipped).toEqual(['minRoutingAgreement', 'minDistinctRatio', 'maxRepIncrease', 'maxLateRepetition']);
  });

  it('routed experts of one layer in disorder are found in that layer', async () => {
    const edits = Object.fromEntries(Array.from({ length: 8 }, (_, e) => [`model.layers.2.mlp.experts.${e}.down_proj.weight`, scaleBy(-1)])); // prettier-ignore
    const report = await validate(dense, await damage.copy(mixture, 'mixture-damaged', edits), { texts, samples: 4, seqLen: 256 }); // prettier-ignore
    expect(failed(report)).toContain('maxLayerError');
    expect(gate(report, 'maxLayerError')).toMatchObject({ layer: 2 });
    expect(report.diagnosis.join()).toContain('Layer 2');
  });

  it('a router that sends everything to the same experts leaves dead ones', async () => {
    const path = await damage.copy(mixture, 'mixture-router', none);
    await rewriteF32(path, 'model.layers.1.mlp.gate.e_score_correction_bias', (values) => values.forEach((_, e) => (values[e] = e < 4 ? 100 : 0))); // prettier-ignore
    const report = await validate(dense, path, { texts, samples: 4, seqLen: 256 });
    expect(report.routing!.layers[1]!.dead).toEqual([4, 5, 6, 7]);
    // A quarter of all experts is the bound; these are 4 of 32.
    expect(gate(report, 'maxDeadExperts')).toMatchObject({ value: 4 / 32, where: 'most in layer 1: 4', layer: 1 });
  });
});

/** Changes an fp32 tensor of a folder in place. */
async function rewriteF32(path: string, tensor: string, change: (values: Float32Array) => void): Promise<void> {
  const opened = await openModel(path);
  const { span } = opened.checkpoint.tensors.get(tensor)!;
  await opened.close();
  const file = await open(span.path, 'r+');
  const bytes = new Uint8Array(span.bytes);
  await file.read(bytes, 0, span.bytes, span.offset);
  change(new Float32Array(bytes.buffer));
  await file.write(bytes, 0, span.bytes, span.offset);
  await file.close();
}
