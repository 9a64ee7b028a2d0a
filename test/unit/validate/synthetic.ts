import { diagnose } from '../../../src/validate/diagnose.js';
import { compareDiversity } from '../../../src/validate/diversity.js';
import { judge, type GateBounds, type Measurements } from '../../../src/validate/gates.js';
import { Random } from '../../../src/base/rng.js';
import type { AttentionMode, RoutingLayer, ValidateReport } from '../../../src/validate/report.js';

export interface Shape {
  readonly layers: number;
  readonly heads: number;
  readonly experts?: number;
  /** This layer's own error is as if its down_proj were zero. */
  readonly broken?: number;
}

/** Measurements as an INT4 candidate would give, of any size. */
export function syntheticMeasurements({ layers, heads, experts = 0, broken }: Shape): Measurements {
  const uniform = (seed: number) => {
    const generator = new Random(seed);
    return () => generator.uniform();
  };
  const random = uniform(7);
  const around = (value: number): number => value * (0.7 + 0.6 * random());
  const r = (value: number): number => Number(value.toPrecision(6));
  const mode = (grow: number): AttentionMode => {
    const map = (of: (layer: number) => number) =>
      Array.from({ length: layers }, (_, l) => Array.from({ length: heads }, () => r(of(l))));
    const divergence = map((l) => around(0.002) * (1 + grow * l) * (random() < 0.02 ? 6 : 1));
    const cosine = divergence.map((row) => row.map((v) => r(1 - v * 2)));
    const overlap = divergence.map((row) => row.map((v) => r(1 - Math.sqrt(v))));
    const worst = divergence
      .flatMap((row, layer) =>
        row.map((d, head) => ({
          layer,
          head,
          divergence: d,
          cosine: cosine[layer]![head]!,
          overlap: overlap[layer]![head]!,
        })),
      )
      .sort((a, b) => b.divergence - a.divergence)
      .slice(0, Math.max(1, Math.ceil(layers * heads * 0.05)));
    const mean = (key: 'divergence' | 'cosine' | 'overlap', list: readonly Record<typeof key, number>[]) =>
      r(list.reduce((a, b) => a + b[key], 0) / list.length);
    const all = divergence.flatMap((row, l) =>
      row.map((d, h) => ({ divergence: d, cosine: cosine[l]![h]!, overlap: overlap[l]![h]! })),
    );
    const numbers = (list: typeof all) => ({
      divergence: mean('divergence', list),
      cosine: mean('cosine', list),
      overlap: mean('overlap', list),
    });
    return { divergence, cosine, overlap, mean: numbers(all), worst: { ...numbers(worst), heads: worst } };
  };
  const lorem =
    'The river bent twice before it reached the old mill, and each time the boats slowed as if to listen. 时间过得很慢，河水却没有停下来。 '.split(
      ' ',
    );
  const response = (seed: number, changed: boolean): string => {
    const next = uniform(seed);
    return Array.from({ length: 60 }, () => {
      const word = lorem[Math.floor(next() * lorem.length)]!;
      return changed && next() < 0.2 ? word.toUpperCase() : word;
    }).join(' ');
  };
  const ids = (text: string): number[] =>
    Array.from(text.split(' '), (w) => [...w].reduce((a, c) => (a * 31 + c.codePointAt(0)!) % 8192, 7));
  const pairs = Array.from({ length: 12 }, (_, i) => ({
    prompt: `Prompt ${i + 1}: the <first> & "last" words of`,
    reference: response(i, false),
    candidate: i === 1 ? response(i, false) : response(i, true),
  }));
  const diversity = {
    ...compareDiversity(
      pairs.map((p) => ids(p.reference)),
      pairs.map((p) => ids(p.candidate)),
      8192,
      { resamples: 200, seed: 0 },
    ),
    settings: { prompts: pairs.length, newTokens: 60, temperature: 0.8, seed: 0 },
    pairs,
  };
  const edges = Array.from({ length: 45 }, (_, i) => 10 ** (-8 + i / 4));
  const numbers = (k: number) => ({
    tokens: 4088,
    kl: { mean: 0.021 * k, median: 0.012 * k, p99: 0.14 * k, max: 1.3 * k },
    top1: 0.912 / k,
    perplexity: { reference: 36.9, candidate: 37.3 * k, ratio: (37.3 * k) / 36.9 },
  });
  const text = (name: string, k: number) => ({ name, ...numbers(k) });
  const routing: RoutingLayer[] = Array.from({ length: experts === 0 ? 0 : layers - 1 }, (_, l) => {
    const raw = Array.from({ length: experts }, () => random() ** 2);
    const total = raw.reduce((a, b) => a + b, 0);
    const load = raw.map((v) => r(v / total));
    const even = 1 / experts;
    return {
      layer: l + 1,
      experts,
      active: Math.min(8, experts),
      load,
      maxVio: r(Math.max(...load) / even - 1),
      entropy: r(-load.reduce((a, p) => a + (p > 0 ? p * Math.log(p) : 0), 0) / Math.log(experts)),
      dead: load.flatMap((p, e) => (p < even / 10 ? [e] : [])),
    };
  });
  const facts = (path: string) => ({
    path,
    format: 'safetensors',
    modelType: experts > 0 ? 'deepseek_v3' : 'llama',
    parameters: 31_988_224,
    storedBytes: path.includes('int4') ? 18_000_000 : 63_976_448,
    layers,
    heads,
    hidden: 512,
    vocab: 8192,
    fingerprint: 'a'.repeat(64),
  });
  return {
    schema: 'deepseek-convert/validate-report',
    version: 1,
    profile: 'quantized',
    reference: facts('/models/dense-32m'),
    candidate: {
      ...facts('/models/dense-32m-int4'),
      quantization: 'compressed-tensors',
      ...(experts > 0 && { experts: { total: experts, active: 8, shared: 1 } }),
    },
    settings: {
      tool: 'deepseek-convert 0.1.0',
      device: 'cpu',
      dtype: 'f32',
      seed: 0,
      samples: 32,
      seqLen: 512,
      tokens: 16384,
      bootstrap: 1000,
      texts: [{ name: 'eval.en-books.txt', sha256: 'b'.repeat(64), tokens: 4096, windows: 8 }],
    },
    logits: {
      ...numbers(1),
      intervals: { kl: { low: 0.0195, high: 0.0223 }, ratio: { low: 1.006, high: 1.0154 } },
      flips: { rightToWrong: 0.021, wrongToRight: 0.013 },
      texts: [text('eval.en-books.txt', 1), text('eval.zh.txt', 1.05), text('eval.wikitext2-raw-test.txt', 1.2)],
      nonFinite: { reference: 0, candidate: 0 },
      windows: Array.from({ length: 32 }, (_, i) => ({
        text: i % 3,
        tokens: 511,
        kl: r(around(0.021)),
        loss: { reference: r(around(3.6)), candidate: r(around(3.62)) },
      })),
      histogram: { edges, counts: edges.slice(1).map((e) => Math.round(2000 * Math.exp(-((Math.log10(e) + 2) ** 2)))) },
      worst: Array.from({ length: 8 }, (_, i) => ({
        text: 'eval.en-books.txt',
        window: i,
        position: 17 * i + 3,
        kl: r(1.3 / (i + 1)),
        before: 'the boats slowed as if to',
        actual: ' listen',
        reference: ' <see>',
        candidate: '\n',
      })),
    },
    layers: Array.from({ length: layers }, (_, index) => {
      const own = index === broken ? 0.86 : around(0.1);
      return {
        index,
        name: `model.layers.${index}`,
        kind: experts > 0 && index > 0 ? ('moe' as const) : ('dense' as const),
        teacherForced: { output: r(own * 0.4), update: r(own) },
        freeRunning: {
          output: r(0.04 * Math.sqrt(index + 1) + (broken !== undefined && index >= broken ? 0.3 : 0)),
          update: r(own * 1.3),
        },
      };
    }),
    attention: { teacherForced: mode(0), freeRunning: mode(0.05), layer0: { expected: false, difference: 0.2 } },
    ...(experts > 0 && {
      routing: {
        layers: routing,
        mean: { maxVio: 1.8, entropy: 0.94 },
        dead: routing.reduce((a, l) => a + l.dead.length, 0),
        experts: experts * routing.length,
      },
    }),
    weights: {
      compared: layers * 9 + 2,
      identical: layers * 2 + 2,
      unmatched: { reference: 0, candidate: 0 },
      kinds: ['mlp.down_proj.weight', 'mlp.gate_proj.weight', 'self_attn.q_proj.weight'].map((kind) => ({
        kind,
        count: layers,
        mean: r(around(0.1)),
        max: 0.14,
      })),
      worst:
        broken === undefined
          ? []
          : [
              {
                name: `model.layers.${broken}.mlp.down_proj.weight`,
                error: 1,
                peers: 0.1,
                layer: broken,
                lost: true as const,
              },
            ],
    },
    tokenizer: {
      tokens: 16384,
      mismatches: [],
      vocabulary: { reference: 8192, candidate: 8192 },
      dropout: { reference: null, candidate: null },
    },
    diversity,
    stability: {
      prompts: 4,
      newTokens: 1000,
      temperature: 0.8,
      quarters: { reference: [0.02, 0.03, 0.03, 0.04], candidate: [0.02, 0.03, 0.05, 0.05] },
      collapsed: { reference: 0, candidate: 0 },
      increase: { value: 0.01, interval: { low: -0.03, high: 0.05 } },
    },
    skipped: [],
    notes: ['A note with <angle> brackets & an ampersand.'],
  };
}

export function syntheticReport(shape: Shape, bounds: GateBounds = {}): ValidateReport {
  const m = syntheticMeasurements(shape);
  const gates = judge(m, bounds);
  return { ...m, gates, passed: gates.every(({ status }) => status !== 'fail'), diagnosis: diagnose(m, gates) };
}
