import { createHash } from 'node:crypto';
import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { calibrationTokens } from '../../../src/arch/calibration.js';
import { forwardContext } from '../../../src/arch/context.js';
import { openModel } from '../../../src/arch/open.js';
import { ResidentModel } from '../../../src/arch/resident.js';
import { WeightReader } from '../../../src/arch/weights.js';
import { silentLog } from '../../../src/base/log.js';
import type { JobEnv } from '../../../src/backend/env.js';
import { openDevice } from '../../../src/backend/load.js';
import type { ContainerName } from '../../../src/moe/containers/types.js';
import { loadOf } from '../../../src/moe/judge.js';
import type { MoeOptions } from '../../../src/moe/options.js';
import { makePlan } from '../../../src/moe/plan.js';
import { previewMoe, runMoe } from '../../../src/moe/run.js';
import { summary, totalsOf } from '../../../src/moe/report.js';
import { run } from '../../../src/nn/run.js';
import { route } from '../../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../../src/tensor/tensor.js';
import { archCase, fixture, relativeError } from '../../arch/support.js';

vi.setConfig({ testTimeout: 300_000 });
// One thread: many small ops on a busy machine otherwise wait for their partner thread.
const device = openDevice({ kind: 'cpu', threads: 1, poison: true });
afterAll(() => device.close());
const env: JobEnv = { device, log: silentLog, signal: new AbortController().signal };
const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const v1 = fixture('v1.0/v1.0_checkpoint.bin');

const job = (name: string, more: Partial<MoeOptions> = {}): MoeOptions => ({
  input: v1,
  out: join(folder, name),
  method: 'split',
  container: 'glm4_moe',
  experts: 8,
  active: 2,
  calibration: { source: [fixture('samples.jsonl')], samples: 16, seqLen: 64, seed: 0 },
  rounds: 1,
  steps: 4,
  tool: { name: 'deepseek-convert', version: '0.0.0' },
  commandLine: 'deepseek-convert moe',
  ...more,
});

/** A copy of a finished output with another config. */
function withConfig(name: string, change: Record<string, unknown>): string {
  const to = mkdtempSync(join(folder, 'edited-'));
  const from = join(folder, name);
  for (const file of readdirSync(from)) cpSync(join(from, file), join(to, file));
  const config = JSON.parse(readFileSync(join(from, 'config.json'), 'utf8')) as Record<string, unknown>;
  writeFileSync(join(to, 'config.json'), JSON.stringify({ ...config, ...change }));
  return to;
}

const tokens = Int32Array.from({ length: 64 }, (_, i) => (i * 1237 + 11) % 8192);
async function logitsOf(path: string, ids = tokens): Promise<Float32Array> {
  const open = await openModel(path);
  using model = await ResidentModel.load(open, env, 'f32');
  using scope = new Scope(env.device);
  const logits = await model.logits(scope, model.hidden(scope, ids, 1)).float32();
  await open.close();
  return logits;
}
const dense = logitsOf(v1);

describe('all experts on', () => {
  it('is the dense model when num_experts_per_tok is raised to all (glm4_moe, qwen2_moe)', async () => {
    for (const container of ['glm4_moe', 'qwen2_moe'] as const) {
      const report = await runMoe(job(`on-${container}`, { container, refit: false }), env);
      expect(report.exactness!.output.relative).toBeLessThan(5e-5);
      const logits = await logitsOf(withConfig(`on-${container}`, { num_experts_per_tok: 8 }));
      expect(relativeError(logits, await dense), container).toBeLessThan(5e-5);
      // And with two of them it is something else: the mask is really there.
      expect(relativeError(await logitsOf(report.out), await dense)).toBeGreaterThan(0.05);
    }
  });

  it('is the dense model where all are active (mixtral)', async () => {
    await runMoe(job('on-mixtral', { container: 'mixtral', active: 8 }), env);
    expect(relativeError(await logitsOf(join(folder, 'on-mixtral')), await dense)).toBeLessThan(5e-5);
  });

  it('keeps first layers dense, pads odd widths, shares several experts', async () => {
    const options = { experts: 5, shared: 2, dense: 2, refit: false } as const;
    for (const container of ['glm4_moe', 'qwen2_moe'] as const) {
      const report = await runMoe(job(`odd-${container}`, { ...options, container, active: 4 }), env);
      expect(report.plan.shape.width).toBe(160); // 7 parts of 1024: 147 and some
      expect(report.layers.map(({ block }) => block)).toEqual([2, 3]);
      const on = container === 'glm4_moe' ? { num_experts_per_tok: 5 } : {};
      // Five times a bf16 weight is rounded: qwen2_moe divides by the four that are active instead.
      const error = relativeError(await logitsOf(withConfig(`odd-${container}`, on)), await dense);
      expect(error).toBeLessThan(container === 'glm4_moe' ? 5e-5 : 0.5);
      expect(report.exactness!.split.relative).toBeLessThan(5e-3);
    }
  });

  it('keeps layers outside of the given ranges dense where the container has a place for them', async () => {
    const layers = [[1, 1], [3, 3]] as const; // prettier-ignore
    const report = await runMoe(job('ranges', { container: 'qwen2_moe', layers, refit: false }), env);
    expect(report.layers.map(({ block }) => block)).toEqual([1, 3]);
    expect(report.plan.config.mlp_only_layers).toEqual([0, 2]);
    const on = withConfig('ranges', { num_experts_per_tok: 8 });
    expect(relativeError(await logitsOf(on), await dense)).toBeLessThan(5e-5);
    expect(relativeError(await logitsOf(report.out), await dense)).toBeGreaterThan(0.05);
    const last = await runMoe(job('last', { layers: [[2, 3]], refit: false }), env);
    expect(last.plan.config.first_k_dense_replace).toBe(2);
  });

  it('is the dense model with all groups open as well, where routing is limited to some', async () => {
    const limit = { groups: 4, topGroups: 2 };
    const report = await runMoe(job('groups', { active: 3, limit, refit: false }), env);
    expect(report.plan.config).toMatchObject({ n_group: 4, topk_group: 2, num_experts_per_tok: 3 });
    expect(report.exactness!.output.relative).toBeLessThan(5e-5);
    const open = (change: object) => logitsOf(withConfig('groups', { num_experts_per_tok: 8, ...change }));
    expect(relativeError(await open({ topk_group: 4 }), await dense)).toBeLessThan(5e-5);
    // The limit stands in the file: without it tokens go elsewhere.
    const [limited, free] = [await logitsOf(report.out), await logitsOf(withConfig('groups', { topk_group: 4 }))];
    expect(relativeError(limited, free)).toBeGreaterThan(0.01);
    expect(report.layers.every(({ router, errors }) => router.kept <= router.oracleKept + 1e-6 && errors.oracle <= errors.routed)).toBe(true); // prettier-ignore
  });

  it('holds for copies with any number of active experts', async () => {
    for (const container of ['glm4_moe', 'qwen2_moe', 'mixtral'] satisfies ContainerName[]) {
      const report = await runMoe(job(`copies-${container}`, { method: 'upcycle', container, experts: 3 }), env);
      expect(report.exactness!.output.relative).toBeLessThan(1e-5);
      expect(relativeError(await logitsOf(report.out), await dense), container).toBeLessThan(1e-5);
    }
  });
});

describe('at the asked budget', () => {
  it('beats the static mask and a random split, and the refit lowers the error further', async () => {
    const calibration = { source: [fixture('samples.jsonl')], samples: 32, seqLen: 128, seed: 0 };
    const report = await runMoe(job('budget', { active: 4, rounds: 2, steps: 8, calibration }), env);
    const totals = totalsOf(report.layers);
    expect(totals.routed).toBeLessThan(totals.staticBias);
    expect(totals.routed).toBeLessThan(totals.randomSplit);
    expect(totals.output).toBeLessThan(totals.routed);
    expect(totals.output).toBeLessThan(totals.staticRefit);
    expect(totals.kept).toBeLessThanOrEqual(totals.oracleKept);
    expect(report.exactness!.split.relative).toBeLessThan(5e-5);
    expect(report.exactness!.output.relative).toBeGreaterThan(1e-3);
    // The file holds what the report was measured on: on unseen text it is nearer to the dense model than a plain split.
    const plain = await runMoe(job('ridge', { active: 4, rounds: 0, steps: 0, refit: false }), env);
    const text = await unseen();
    const [want, better, worse] = await Promise.all([v1, report.out, plain.out].map((path) => logitsOf(path, text)));
    expect(divergence(want!, better!)).toBeLessThan(0.9 * divergence(want!, worse!));
  });
});

describe('a balanced load', () => {
  it('stays below the bound on calibration text, lies in the file, and its cost is reported', async () => {
    const balanced = await runMoe(job('balanced', { active: 3, balance: 0.1, refit: false }), env);
    const plain = await runMoe(job('unbalanced', { active: 3, refit: false }), env);
    for (const { balance, router, errors, tokens } of balanced.layers) {
      expect(balance!.maxVio[0]).toBeGreaterThan(balance!.maxVio[1]);
      expect(balance!.maxVio[1]).toBeLessThanOrEqual(0.1);
      expect(tokens).toBeGreaterThan(500);
      expect(balance!.before.kept).toBeGreaterThan(router.kept - 0.01);
      expect(errors.routed).toBeLessThan(1.15 * balance!.error);
    }
    const totals = totalsOf(balanced.layers);
    expect(totals.unbalanced!.maxVio).toBeGreaterThan(1.3 * totals.maxVio);
    expect(totals.unbalanced!.bound).toBe(0.1);
    expect(summary(balanced).join()).toMatch(
      /Balanced to MaxVio 0.1 on calibration text \(before at most [^]*layer error/,
    );
    expect(totalsOf(plain.layers).unbalanced).toBeUndefined();
    // What the file's own router does with the calibration text of its first layer.
    expect(await firstLayerVio(balanced.out)).toBeLessThan(0.15);
    expect(await firstLayerVio(plain.out)).toBeGreaterThan(0.25);
  });
});

/** MaxVio of the first layer as the container routes it, on text of the calibration. */
async function firstLayerVio(path: string): Promise<number> {
  const open = await openModel(path);
  const set = await calibrationTokens(open, { ...job('').calibration!, seqLen: 64 }, env);
  const reader = new WeightReader(open, env.device, 'f32');
  using scope = new Scope(env.device);
  const outer = await reader.outer(scope, 'embedding');
  const block = open.model.blocks[0]!;
  const weights = await reader.block(0, scope);
  const ctx = forwardContext(scope, open.model, weights, set.n, set.seqLen, { tokens: set.tokens });
  const x = open.model.embed(scope.from('i32', [set.n, set.seqLen], set.tokens), forwardContext(scope, open.model, outer, set.n, set.seqLen)); // prettier-ignore
  let idx: Tensor | undefined;
  run(block.forward(x, ctx), ctx, (call) => {
    if (call.kind === 'route') idx = route(scope, call.logits, call.options).idx;
    return undefined;
  });
  const { active, experts } = block.moe!;
  const { maxVio } = loadOf(await idx!.int32(), active, experts);
  await open.close();
  return maxVio;
}

describe('the number of shared experts', () => {
  it('is searched among mixtures with as many neurons on, by what the conversion would lose', async () => {
    const { layers, plan, sharedSearch } = await runMoe(job('shared', { experts: 7, active: 3, shared: 'auto' }), env);
    const { trials, best, layers: seen } = sharedSearch!;
    expect(trials.map(({ shared, experts, active }) => [shared, experts, active])).toEqual([[1, 7, 3], [2, 6, 2]]); // prettier-ignore
    expect(best.error).toBe(Math.min(...trials.map(({ error }) => error)));
    expect(plan.shape).toMatchObject({ shared: best.shared, routed: best.experts, active: best.active });
    // The first layer sees the dense model's states in the conversion as well: there the figures are its own.
    expect(seen).toEqual([0, 2, 3]);
    const lost = ([layer]: typeof layers) => layer!.errors.refit ?? layer!.errors.routed;
    expect(lost(layers) / best.errors[0]!).toBeCloseTo(1, 3);
    const other = trials.find((trial) => trial !== best)!;
    const made = await runMoe(job('shared-other', other), env);
    expect(lost(made.layers) / other.errors[0]!).toBeCloseTo(1, 3);
    expect(lost(made.layers) / lost(layers)).not.toBeCloseTo(1, 3);
  });

  it('is searched once: a job that goes on takes what it found, and ends with the same bytes', async () => {
    const options = { experts: 7, active: 3, shared: 'auto' } as const;
    const stop = new AbortController();
    const log = { ...env.log, progress: ({ done }: { done: number }) => done === 1 && stop.abort() };
    await expect(runMoe(job('search', options), { ...env, log, signal: stop.signal })).rejects.toThrow('are saved');
    const steps = join(folder, 'search.part', 'steps');
    const found = readdirSync(steps).map((name) => join(steps, name)).filter((path) => readFileSync(path, 'utf8').includes('"shared-search"')); // prettier-ignore
    expect(found).toHaveLength(1);
    cpSync(join(folder, 'search.part'), join(folder, 'edited.part'), { recursive: true });
    const report = await runMoe(job('search', options), env);
    expect(report.resumed).toBe(true);
    // The one before was never interrupted.
    for (const name of ['model.safetensors', 'config.json']) {
      expect(readFileSync(join(folder, 'search', name)).equals(readFileSync(join(folder, 'shared', name)))).toBe(true); // prettier-ignore
    }
    // Only what is not searched again can tell something else.
    const path = found[0]!.replace('search.part', 'edited.part');
    writeFileSync(path, readFileSync(path, 'utf8').replaceAll(/"tokens":\d+/g, '"tokens":77'));
    expect((await runMoe(job('edited', options), env)).sharedSearch!.tokens).toBe(77);
    // A finished output is known again without a search.
    const reused = await runMoe(job('search', { ...options, reuse: true }), env);
    expect(reused.plan.shape).toEqual(report.plan.shape);
    expect(reused.sharedSearch).toEqual(report.sharedSearch);
  });
});

/** Tokens of the sampled text's last lines, which calibration does not reach. */
async function unseen(): Promise<Int32Array<ArrayBuffer>> {
  const open = await openModel(v1);
  const lines = readFileSync(fixture('samples.jsonl'), 'utf8').trim().split('\n').slice(-4);
  const text = lines.map((line) => (JSON.parse(line) as { text: string }).text).join('\n');
  const ids = Int32Array.from((await (await open.tokenizer()).encode(text)).subarray(0, 256));
  await open.close();
  return ids;
}

/** Mean KL divergence of the next-token distributions, rows of 8,192 logits. */
function divergence(want: Float32Array, got: Float32Array): number {
  const vocab = 8192;
  const rows = want.length / vocab;
  let sum = 0;
  for (let r = 0; r < rows; r++) {
    const [p, q] = [want, got].map((all) => {
      const row = all.subarray(r * vocab, (r + 1) * vocab);
      const top = row.reduce((a, b) => Math.max(a, b), -Infinity);
      const log = Math.log(row.reduce((total, x) => total + Math.exp(x - top), 0)) + top;
      return row.map((x) => x - log);
    });
    p!.forEach((x, i) => (sum += Math.exp(x) * (x - q![i]!)));
  }
  return sum / rows;
}

describe('durability', () => {
  const hash = (path: string) => createHash('sha256').update(readFileSync(path)).digest('hex');

  it('goes on after an interruption and ends with the same bytes, as .bin with its config beside it', async () => {
    await runMoe(job('whole.bin', { active: 4 }), env);
    const stop = new AbortController();
    const log = { ...env.log, progress: ({ done }: { done: number }) => done === 2 && stop.abort() };
    const interrupted: JobEnv = { ...env, log, signal: stop.signal };
    await expect(runMoe(job('parts.bin', { active: 4 }), interrupted)).rejects.toThrow('finished blocks are saved');
    expect(existsSync(join(folder, 'parts.bin'))).toBe(false);
    const report = await runMoe(job('parts.bin', { active: 4 }), env);
    expect(report.resumed).toBe(true);
    expect(report.layers).toHaveLength(4);
    expect(hash(join(folder, 'parts.config.json'))).toBe(hash(join(folder, 'whole.config.json')));
    // The archive's inner folder carries the file's name: compare what is read.
    const [a, b] = [await logitsOf(join(folder, 'parts.bin')), await logitsOf(join(folder, 'whole.bin'))];
    expect(Buffer.from(a.buffer).equals(Buffer.from(b.buffer))).toBe(true);
    expect(report.exactness).toEqual(readProvenance('whole').allExpertsOn);
  });

  const readProvenance = (stem: string) =>
    JSON.parse(readFileSync(join(folder, `${stem}.deepseek-convert.json`), 'utf8')) as { allExpertsOn: unknown };
});

describe('refusals', () => {
  const refused = async (more: Partial<MoeOptions>) => {
    const name = `refused-${Math.random()}`;
    const error = await previewMoe(job(name, more)).then(() => undefined, (e: unknown) => e as Error); // prettier-ignore
    expect(existsSync(join(folder, name))).toBe(false);
    return error?.message ?? 'accepted';
  };

  it('names what does not fit', async () => {
    expect(await refused({ active: 9 })).toContain('More active experts than there are');
    expect(await refused({ pad: 'none' })).toContain('does not divide');
    expect(await refused({ shared: 0 })).toContain('--container mixtral');
    expect(await refused({ container: 'mixtral', shared: 1 })).toContain('glm4_moe or qwen2_moe');
    expect(await refused({ container: 'mixtral', dense: 1 })).toContain('experts in every layer');
    expect(await refused({ dense: 4 })).toContain('leaves no layer');
    expect(await refused({ shared: 'auto', active: 8 })).toContain('weighs what experts that are off cost');
    expect(await refused({ shared: 'auto', method: 'upcycle' })).toContain('weighs what experts that are off cost');
    expect(await refused({ shared: 'auto', container: 'mixtral' })).toContain('cannot have shared experts');
    const limit = (groups: number, topGroups: number) => ({ groups, topGroups });
    expect(await refused({ limit: limit(3, 2) })).toContain('do not divide into equal groups');
    expect(await refused({ limit: limit(8, 4) })).toContain('needs two');
    expect(await refused({ active: 3, limit: limit(4, 1) })).toMatch(
      /fewer experts than a token takes[^]*--top-groups from 2 to 3/,
    );
    expect(await refused({ limit: limit(4, 4) })).toMatch(/limit nothing[^]*--top-groups from 1 to 3[^]*the choice is the same/); // prettier-ignore
    expect(await refused({ active: 7, limit: limit(4, 3) })).toMatch(/fewer experts than a token takes[^]*--active up to 6/); // prettier-ignore
    expect(await refused({ limit: limit(4, 5) })).toContain('More best groups than there are');
    expect(await refused({ container: 'qwen2_moe', limit: limit(4, 2) })).toMatch(/qwen2_moe cannot limit routing to groups[^]*--container glm4_moe/); // prettier-ignore
    expect(await refused({ balance: 0.001 })).toContain('at least 0.01');
    expect(await refused({ container: 'mixtral', balance: 0.1 })).toMatch(/mixtral cannot balance loads: its router has no selection bias[^]*glm4_moe/); // prettier-ignore
    expect(await refused({ active: 8, balance: 0.1 })).toContain('every load is the same');
    expect(await refused({ method: 'upcycle', balance: 0.1 })).toContain('--balance 0.1 with upcycle');
    expect(await refused({ split: 'static', balance: 0.1 })).toContain('--balance 0.1 with static');
    const middle = await refused({ layers: [[1, 2]] });
    expect(middle).toContain('In the container glm4_moe only the first layers can stay dense');
    expect(middle).toContain('--layers 1-2, which leaves layer 3 dense');
    expect(middle).toContain('--container qwen2_moe');
    expect(await refused({ container: 'mixtral', layers: [[1, 3]] })).toContain('experts in every layer');
    expect(await refused({ layers: [[2, 4]] })).toContain('layers from 0 to 3');
    expect(await refused({ layers: [[3, 2]] })).toContain('ranges upwards');
    expect(await refused({ layers: [[1, 3]], dense: 1 })).toContain('Either the first layers stay dense');
    expect(await refused({ input: fixture('moe-6m') })).toMatch(/mixture of experts already[^]*--prune-experts/);
    expect(await refused({ method: 'upcycle', active: 8 })).toContain('only multiplies');
    expect(await refused({ experts: 2000 })).toContain('More experts than neurons');
  });

  it('refuses by name what has no gate, or biases in its feed-forward part', async () => {
    const gpt2 = archCase('llama', { config: (config) => (config.model_type = 'gpt2') });
    expect(await refused({ input: gpt2 })).toContain('This architecture is not supported');
    const biased = archCase('llama-tied-bias');
    const message = await refused({ input: biased });
    expect(message).toContain('has biases, which experts do not have in any container');
    expect(message).toContain('model.layers.0.mlp.gate_proj.bias');
  });

  it('refuses by name a block without a gated part, which no architecture that is read has today', async () => {
    const open = await openModel(v1);
    const { model } = open;
    const blocks = model.blocks.map((block) => (block.index === 2 ? { ...block, ffn: undefined } : block)) as typeof model.blocks; // prettier-ignore
    const bare = { ...open, model: { ...model, blocks }, checkpoint: open.checkpoint, tensors: open.tensors } as typeof open; // prettier-ignore
    const recipe = { method: 'split', container: 'glm4_moe', experts: 8, active: 2 } as const;
    expect(() => makePlan(bare, recipe, false)).toThrow(/has no gate[^]*model.layers.2 \(llama\)/);
    await open.close();
  });

  it('refuses models with vision layers, whose text part no container holds alone', async () => {
    expect(await refused({ input: archCase('deepseek_vl') })).toContain('No container holds this architecture');
  });

  it.each([1, 0, 2.5, 5000])('refuses %f experts', async (experts) => {
    expect(await refused({ experts, active: 1 })).toContain('a whole number from 2 to 4096');
  });

  it('says how much calibration text a router needs', async () => {
    const calibration = { source: [fixture('samples.jsonl')], samples: 3, seqLen: 128, seed: 0 };
    await expect(runMoe(job('little', { calibration }), env)).rejects.toThrow(
      /at least 1024, better 4096[^]*got 384 tokens[^]*--samples to 32/,
    );
    expect(existsSync(join(folder, 'little'))).toBe(false);
  });

  it('refuses to go on with another recipe in the same work folder', async () => {
    const stop = new AbortController();
    const log = { ...env.log, progress: () => stop.abort() };
    await expect(runMoe(job('other'), { ...env, log, signal: stop.signal })).rejects.toThrow('saved');
    await expect(runMoe(job('other', { active: 3 }), env)).rejects.toThrow('recipe.shape.active: 2 -> 3');
  });

  it('does not write over what is there', async () => {
    mkdirSync(join(folder, 'there'));
    writeFileSync(join(folder, 'there', 'config.json'), '{}');
    await expect(runMoe(job('there'), env)).rejects.toThrow('exists already');
  });
});
