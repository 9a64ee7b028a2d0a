import { describe, expect, it } from 'vitest';
import { diagnose } from '../../../src/validate/diagnose.js';
import { gateFlag, gates, judge, type Measurements } from '../../../src/validate/gates.js';
import { gateFailure } from '../../../src/validate/run.js';
import { syntheticMeasurements, syntheticReport } from './synthetic.js';

const shape = { layers: 6, heads: 8 };
const failedIds = (m: Measurements, bounds = {}): string[] =>
  judge(m, bounds).flatMap(({ id, status }) => (status === 'fail' ? [id] : []));

describe('gates', () => {
  it('have unique flags, a bound or none for each profile, and say what they mean', () => {
    expect(new Set(gates.map(({ id }) => gateFlag(id))).size).toBe(gates.length);
    expect(gateFlag('maxKlP99')).toBe('--max-kl-p99');
    for (const gate of gates) {
      expect(gate.id.startsWith(gate.direction)).toBe(true);
      for (const text of [gate.metric, gate.meaning, gate.remedy]) expect(text.length).toBeGreaterThan(10);
      const { exact, quantized, restructured } = gate.bounds;
      if (exact === null || quantized === null || restructured === null) continue;
      const stricter =
        gate.direction === 'max' ? [exact, quantized, restructured] : [-exact, -quantized, -restructured];
      expect(stricter).toEqual(stricter.toSorted((a, b) => a - b));
    }
  });

  it('pass an honest INT4', () => {
    expect(failedIds(syntheticMeasurements(shape))).toEqual([]);
  });

  it('name the layer whose own error stands out, and the tensor', () => {
    const m = syntheticMeasurements({ ...shape, broken: 3 });
    const results = judge(m, {});
    expect(failedIds(m)).toEqual(['maxLayerError', 'maxWeightError']);
    expect(results.find(({ id }) => id === 'maxLayerError')).toMatchObject({
      layer: 3,
      where: 'layer 3 (model.layers.3)',
    });
    expect(diagnose(m, results)[0]).toMatch(/^Layer 3 \(model\.layers\.3\) stands out/);
    expect(diagnose(m, results)[1]).toContain('model.layers.3.mlp.down_proj.weight differs by 1 (all zero)');
  });

  it('a loss in the logits names the worst text and the layer with the largest error', () => {
    const m = syntheticMeasurements({ ...shape, broken: 2 });
    const bad = { ...m, logits: { ...m.logits, kl: { ...m.logits.kl, mean: 3 } } };
    const kl = judge(bad, {}).find(({ id }) => id === 'maxKl')!;
    expect(kl).toMatchObject({ status: 'fail', value: 3, layer: 2 });
    expect(kl.where).toContain('worst text eval.wikitext2-raw-test.txt');
    expect(kl.where).toContain('largest layer error in layer 2 (model.layers.2)');
    expect(kl.remedy).toBeDefined();
  });

  it('hold at the bound itself, in both directions', () => {
    const m = syntheticMeasurements(shape);
    const { kl, top1 } = m.logits;
    expect(failedIds(m, { maxKl: kl.mean, minTop1: top1 })).toEqual([]);
    expect(failedIds(m, { maxKl: kl.mean * 0.999, minTop1: top1 * 1.001 })).toEqual(['maxKl', 'minTop1']);
  });

  it('fail on what is not a number', () => {
    const m = syntheticMeasurements(shape);
    const bad = { ...m, logits: { ...m.logits, kl: { ...m.logits.kl, mean: NaN } } };
    expect(judge(bad, {}).find(({ id }) => id === 'maxKl')).toMatchObject({ status: 'fail', value: null });
  });

  it('are switched off by null and on by a bound', () => {
    const m = syntheticMeasurements({ ...shape, experts: 8 });
    expect(judge(m, { maxKl: null }).find(({ id }) => id === 'maxKl')?.status).toBe('off');
    expect(failedIds(m, { maxLoadViolation: 0.01 })).toEqual(['maxLoadViolation']);
  });

  it('say why when there is nothing to measure', () => {
    const { attention: _, diversity: __, ...rest } = syntheticMeasurements(shape);
    const skipped = judge(rest, {}).filter(({ status }) => status === 'skipped');
    expect(skipped.map(({ id }) => id)).toContain('maxAttentionJs');
    for (const gate of skipped) expect(gate.reason).toBeTruthy();
  });

  it('judge a wide error by its peers: rescaled weights pass, one damaged tensor does not', () => {
    const m = syntheticMeasurements(shape);
    const worst = (error: number, peers: number) => ({
      ...m,
      weights: { ...m.weights!, worst: [{ name: 'model.layers.1.mlp.up_proj.weight', error, peers, layer: 1 }] },
    });
    expect(failedIds(worst(1.8, 1.5))).toEqual([]);
    expect(failedIds(worst(1.0, 0.1))).toEqual(['maxWeightError']);
  });

  it('an equal layer 0 must give equal patterns', () => {
    const m = syntheticMeasurements(shape);
    const withLayer0 = (expected: boolean, difference: number) => ({
      ...m,
      attention: { ...m.attention!, layer0: { expected, difference } },
    });
    expect(failedIds(withLayer0(true, 0))).toEqual([]);
    expect(failedIds(withLayer0(false, 0.5))).toEqual([]);
    const bad = withLayer0(true, 1e-6);
    expect(failedIds(bad)).toEqual(['maxLayer0Change']);
    expect(diagnose(bad, judge(bad, {}))[0]).toContain('configurations disagree');
  });
});

describe('gateFailure', () => {
  it('is nothing for a report that passed', () => {
    expect(gateFailure(syntheticReport(shape))).toBeUndefined();
  });
  it('exits with 3 and says metric, value, bound, place and remedy of each failure', () => {
    const error = gateFailure(syntheticReport({ ...shape, broken: 4 }))!;
    expect(error).toMatchObject({ kind: 'gate', exitCode: 3 });
    for (const part of ['0.86', 'at most 0.3', '--max-layer-error', 'layer 4 (model.layers.4)', 'more bits']) {
      expect(error.message).toContain(part);
    }
  });
});
