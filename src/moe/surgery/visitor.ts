import type { FloatDType } from '../../base/dtype.js';
import { fileSource } from '../../base/io.js';
import type { Json } from '../../base/job.js';
import type { JobEnv } from '../../backend/env.js';
import type { CheckpointWriter } from '../../checkpoint/types.js';
import type { Call, ExpertsCall, ForwardContext, LinearCall } from '../../nn/calls.js';
import type { MoeLayerSpec } from '../../nn/moe.js';
import type { BlockVisitor, Site } from '../../arch/stream.js';
import type { OpenModel } from '../../arch/open.js';
import type { Block, FfnSpec } from '../../arch/types.js';
import type { WeightReader } from '../../arch/weights.js';
import { cast, copyInto, gather, gemm, groupedGemm, matmulT, route } from '../../tensor/ops.js';
import { Scope, type Tensor } from '../../tensor/tensor.js';
import { writeThrough } from '../output.js';
import { toJson } from '../report.js';
import { captureInputs, pick, type FfnWeights } from '../sample.js';
import { outputDistances, ward } from './cluster.js';
import { importance, keepLargest, measureUse, type ExpertUse } from './importance.js';
import { judgeLayer } from './judge.js';
import { routedWeights, type RoutedWeights } from './layer.js';
import { mergeNetworks, mergeRows, shareOf } from './merge.js';
import type { PruneMeasure } from './options.js';
import type { SurgeryPlan } from './plan.js';
import { searchExperts } from './search.js';
import { detailOf, type SurgeryLayer } from './report.js';

export interface SurgeryVisitorOptions {
  readonly env: JobEnv;
  readonly open: OpenModel;
  readonly plan: SurgeryPlan;
  readonly by: PruneMeasure;
  readonly seed: number;
  readonly writer: CheckpointWriter;
  readonly reader: WeightReader;
  /** Tokens of a layer that are looked at, at most. */
  readonly sampleTokens: number;
}

/** Tokens that all experts are run on to compare them. */
const comparedTokens = 2048;

/** The routed part of one layer with fewer experts. */
interface Converted {
  readonly moe: MoeLayerSpec;
  /** In the stream's precision. */
  readonly weights: RoutedWeights;
  /** The experts that make up each of the new ones. */
  readonly members: readonly (readonly number[])[];
  /** As they are stored: networks by their new number, where they are not one of the old ones; router and bias. */
  readonly merged: ReadonlyMap<number, FfnWeights>;
  readonly router: Tensor;
  readonly bias: Tensor | undefined;
}

const parts = ['gate', 'up', 'down'] as const;

/** Takes experts out of each mixture as the calibration stream comes by, and writes the block out. */
export class SurgeryVisitor implements BlockVisitor, Disposable {
  readonly #options: SurgeryVisitorOptions;
  readonly #types: ReadonlyMap<string, FloatDType>;
  #scope: Scope | undefined;
  #converted: Converted | undefined;
  #report: SurgeryLayer | undefined;

  constructor(options: SurgeryVisitorOptions) {
    this.#options = options;
    this.#types = new Map(options.plan.tensors.map(({ planned }) => [planned.name, planned.dtype as FloatDType]));
  }

  holds(call: LinearCall | ExpertsCall, block: Block): boolean {
    return call.kind === 'linear' && call.linears[0]?.name === block.moe?.router.name;
  }

  async visit(site: Site): Promise<void> {
    const { env, plan, seed, sampleTokens } = this.#options;
    const { block } = site;
    const m = block.moe!.layer;
    this.#scope = new Scope(env.device);
    using work = new Scope(env.device);
    const before = routedWeights(m, site.weights);
    const picked = pick(site.tokens, sampleTokens);
    const x = await captureInputs(site, picked, work);
    const fit = x.slice(0, 0, picked.fit);
    const use = await measureUse(m, before, fit);
    const members = await this.#choose(m, before, fit, use, seed + block.index);
    this.#converted = await this.#convert(this.#scope, block, members, use, fit, before);
    const { errors, load, router } = await judgeLayer({
      ...{ m, before, after: this.#converted, use, seed: seed + block.index, groups: plan.groups },
      x: x.slice(0, picked.fit, picked.fit + picked.held),
    });
    this.#report = {
      block: block.index,
      tokens: picked.fit,
      held: picked.held,
      members: members.map((list) => [...list]),
      values: {
        reap: Array.from(importance(use, 'reap', 0)),
        frequency: Array.from(use.counts, (n) => n / use.tokens),
      },
      unused: use.counts.filter((n) => n === 0).length,
      errors,
      load,
      router,
    };
  }

  async #choose(m: MoeLayerSpec, weights: RoutedWeights, x: Tensor, use: ExpertUse, seed: number): Promise<number[][]> {
    const { plan, by } = this.#options;
    const { kind, groups } = plan;
    const [all, keep] = plan.experts;
    if (keep === all) return Array.from({ length: all }, (_, e) => [e]);
    using work = new Scope(x.device);
    const step = Math.max(1, Math.floor(x.dim(0) / comparedTokens));
    const spread = Int32Array.from({ length: Math.floor(x.dim(0) / step) }, (_, i) => i * step);
    const rows = () => gather(work, x, work.from('i32', [spread.length], spread));
    if (kind === 'merge') return ward(await outputDistances(m, weights, rows()), use.counts, keep, groups);
    const kept = by === 'error' ? await searchExperts(m, weights, rows(), keep, groups) : keepLargest(importance(use, by, seed), keep, groups); // prettier-ignore
    return kept.map((e) => [e]);
  }

  async #convert(
    scope: Scope,
    block: Block,
    members: readonly (readonly number[])[],
    use: ExpertUse,
    x: Tensor,
    before: RoutedWeights,
  ): Promise<Converted> {
    const { plan, reader } = this.#options;
    const after = plan.model.blocks.find(({ index }) => index === block.index)!.moe!.layer;
    using work = new Scope(scope.device);
    const merged = new Map<number, FfnWeights>();
    for (const [n, list] of members.entries()) {
      if (list.length > 1) merged.set(n, await this.#merge(scope, block.moe!.layer.experts, after.experts[n]!, list, use)); // prettier-ignore
    }
    const heads = work.from(
      'i32',
      [members.length],
      Int32Array.from(members, ([first]) => first!),
    );
    const old = await reader.tensor(`${after.router.name}.weight`, work, 'f32');
    const rows = gather(work, old, heads);
    if (merged.size > 0) {
      const numbers = [...merged.keys()];
      const made = await mergeRows(work, old, numbers.map((n) => members[n]!), use.counts, x); // prettier-ignore
      numbers.forEach((n, i) => copyInto(rows.at(n), made.at(i)));
    }
    const router = cast(scope, rows, this.#types.get(`${after.router.name}.weight`)!);
    const bias = after.routeBias === undefined ? undefined : await this.#bias(scope, after.routeBias, members, use);
    const pick = (part: (typeof parts)[number]): Tensor => {
      const [count, ...size] = before[part].shape as [number, number, number];
      const flat = gather(scope, before[part].view(count, -1), heads);
      const stack = flat.view(members.length, ...size);
      for (const [n, network] of merged) copyInto(stack.at(n), network[part]);
      return stack;
    };
    const weights = {
      router: cast(scope, router, before.router.dtype),
      bias: bias && cast(scope, bias, 'f32'),
      ...{ gate: pick('gate'), up: pick('up'), down: pick('down') },
    };
    return { moe: after, weights, members, merged, router, bias };
  }

  /** Several experts as one, as they are stored. */
  async #merge(
    scope: Scope,
    old: readonly FfnSpec[],
    into: FfnSpec,
    members: readonly number[],
    use: ExpertUse,
  ): Promise<FfnWeights> {
    using work = new Scope(scope.device);
    const read = (name: string) => this.#options.reader.tensor(`${name}.weight`, work, 'f32');
    const networks: FfnWeights[] = [];
    for (const e of members) {
      const { gate, up, down } = old[e]!;
      networks.push({ gate: await read(gate.name), up: await read(up.name), down: await read(down.name) });
    }
    const sum = await mergeNetworks(work, networks, members.map((e) => use.counts[e]!)); // prettier-ignore
    const store = (part: (typeof parts)[number]) =>
      cast(scope, sum[part], this.#types.get(`${into[part].name}.weight`)!);
    return { gate: store('gate'), up: store('up'), down: store('down') };
  }

  /** Of merged experts the mean by use. */
  async #bias(scope: Scope, name: string, members: readonly (readonly number[])[], use: ExpertUse): Promise<Tensor> {
    using work = new Scope(scope.device);
    const old = await this.#options.reader.tensor(name, work, 'f32');
    const count = old.dim(0);
    const shares = new Float32Array(members.length * count);
    members.forEach((list, n) => list.forEach((e) => (shares[n * count + e] = shareOf(e, list, use.counts))));
    const means = gemm(work, work.from('f32', [members.length, count], shares), old.view(-1, 1));
    return cast(scope, means.view(-1), this.#types.get(name)!);
  }

  answer(call: Call, { scope }: ForwardContext, block: Block): unknown {
    if (!this.#converted || !block.moe) return undefined;
    const { moe, weights } = this.#converted;
    if (call.kind === 'linear' && call.linears[0]?.name === moe.router.name) {
      return [matmulT(scope, call.x, weights.router, { dtype: 'f32' })];
    }
    if (call.kind === 'route') {
      return route(scope, call.logits, { ...moe.route, ...(weights.bias && { bias: weights.bias }) });
    }
    if (call.kind !== 'experts') return undefined;
    // Rows were sorted for as many experts as there were: behind the last one there are none.
    const offsets = call.order.offsets.slice(0, 0, moe.experts.length + 1);
    const part = parts.find((name) => block.moe!.expertLinears[0]![name].name === call.linears[0]![0]!.name);
    const stacks = part === 'down' ? [weights.down] : [weights.gate, weights.up];
    return stacks.map((stack) => groupedGemm(scope, call.x, stack, offsets));
  }

  async finish(block: Block): Promise<{ data: Json; detail: string }> {
    const { env, plan, writer, reader } = this.#options;
    await writeThrough(plan.tensors, block.index, writer, reader, env.device);
    if (this.#converted) await this.#write(block, this.#converted);
    await writer.flush();
    const report = this.#report;
    this[Symbol.dispose]();
    return { data: toJson(report ?? null), detail: detailOf(report) };
  }

  async #write(block: Block, { moe, members, merged, router, bias }: Converted): Promise<void> {
    const { env, writer, reader, open } = this.#options;
    await writer.write(`${moe.router.name}.weight`, router.source());
    if (bias) await writer.write(moe.routeBias!, bias.source());
    for (const [n, into] of moe.experts.entries()) {
      const network = merged.get(n);
      const from = block.moe!.expertLinears[members[n]![0]!]!;
      for (const part of parts) {
        const name = `${into[part].name}.weight`;
        const dtype = this.#types.get(name)!;
        if (network) {
          await writer.write(name, network[part].source());
          continue;
        }
        // What stays is copied, bit for bit.
        const { entry, linear } = open.tensors.get(`${from[part].name}.weight`)!;
        if (!linear && !entry.strides && entry.encoding.kind === 'plain' && entry.encoding.dtype === dtype) {
          await writer.write(name, fileSource(entry.span));
          continue;
        }
        using scope = new Scope(env.device);
        await writer.write(name, (await reader.tensor(`${from[part].name}.weight`, scope, dtype)).source());
      }
    }
  }

  [Symbol.dispose](): void {
    this.#scope?.[Symbol.dispose]();
    [this.#scope, this.#converted, this.#report] = [undefined, undefined, undefined];
  }
}
