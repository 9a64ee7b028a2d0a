import { bug } from '../base/errors.js';
import { elementCount } from '../base/dtype.js';
import { bytesSource, fileSource } from '../base/io.js';
import { OpenFiles } from '../arch/files.js';
import { planGgufModel } from '../arch/gguf.js';
import { TensorLoader } from '../arch/load.js';
import type { OpenModel } from '../arch/open.js';
import type { StoredWeight } from '../arch/stored.js';
import { elementType } from '../formats/assembly.js';
import type { GgufFileType, GgufMetadata } from '../checkpoint/gguf-config.js';
import type { GgufTensor } from '../checkpoint/gguf-tensors.js';
import type { PlannedTensor, TensorSink } from '../checkpoint/types.js';
import { cast, copyInto, decode, encode } from '../tensor/ops.js';
import { fittingType, mixtureType } from '../targets/gguf-mixture.js';
import { Scope, Tensor } from '../tensor/tensor.js';
import type { JobEnv } from '../backend/env.js';
import { blocksOfCodes } from './codes-as-blocks.js';
import { plannedBytes, type OutputPlan, type OutputTensor } from './output.js';
import type { LinearPlan, QuantPlan } from './plan.js';
import type { Coded } from './rtn.js';
import type { Recipe, Scheme } from './scheme.js';
import type { Source, Stored, Target } from './target.js';

const moduleOf = (tensor: string): string => tensor.replace(/\.weight$/, '');

/** Where a quantized linear goes in the file. */
interface Place {
  readonly tensor: GgufTensor;
  /** Which part of a stack of experts; undefined: the tensor is the linear's alone. */
  readonly expert?: number;
}

export interface GgufOutput {
  readonly plan: OutputPlan;
  readonly metadata: GgufMetadata;
  target(env: JobEnv): GgufTarget;
  readonly notes: readonly string[];
}

/** A GGUF file of what the plan quantizes, in its blocks; everything else stays in its own precision. */
export async function planGgufOutput(open: OpenModel, plan: QuantPlan, recipe: Recipe): Promise<GgufOutput> {
  const { metadata, tensors, computed, notes } = await planGgufModel(open.checkpoint, fileType(recipe));
  const places = new Map<string, Place>();
  const out: OutputTensor[] = [];
  const through = new Map<number, OutputTensor[]>();
  for (const tensor of tensors) {
    const linears = linearsOf(tensor, plan);
    const schemes = new Set(linears?.map(({ scheme }) => scheme?.blocks));
    const [blocks] = schemes;
    if (linears && blocks !== undefined && schemes.size === 1) {
      linears.forEach(({ linear }, e) => places.set(linear.name, { tensor, ...(linears.length > 1 && { expert: e }) }));
      const encoding = { kind: 'ggml', type: blocks } as const;
      const planned = { name: tensor.name, shape: tensor.shape, dtype: 'u8' as const, encoding };
      out.push({ planned, origin: { kind: 'linear', name: linears[0]!.linear.name } });
      continue;
    }
    const own = {
      planned: outerBlocks(tensor, recipe, open) ?? highPrecision(tensor),
      origin: { kind: 'values' as const, name: tensor.name },
    };
    out.push(own);
    const block = Number(/^blk\.(\d+)\./.exec(tensor.name)?.[1] ?? -1);
    through.set(block, [...(through.get(block) ?? []), own]);
  }
  for (const [name, values] of computed) {
    const planned = { name, shape: [values.length], dtype: 'f32' as const };
    const own = { planned, origin: { kind: 'values' as const, name } };
    out.push(own);
    through.set(-1, [...(through.get(-1) ?? []), own]);
  }
  const bytes = out.reduce((sum, { planned }) => sum + plannedBytes(planned), 0);
  const target = (env: JobEnv) => new GgufTarget(plan, places, tensors, computed, through, env);
  return { plan: { tensors: out, through, bytes }, metadata, target, notes };
}

const fileType = ({ blocks = 'q4_k', mixture }: Recipe): GgufFileType =>
  mixture ?? (blocks === 'q4_k' ? 'q4_k_s' : blocks);

/** Mixtures round the embedding and the head too; pure types leave them as they are. */
function outerBlocks(
  { name, shape }: GgufTensor,
  { mixture }: Recipe,
  { model }: OpenModel,
): PlannedTensor | undefined {
  if (mixture === undefined || !/^(token_embd|output)\.weight$/.test(name)) return undefined;
  const isHead = name === 'output.weight' || model.tied;
  const wanted = mixtureType(mixture, isHead ? 'output' : 'token_embd', 0, model.blocks.length, 0);
  const type = fittingType(shape.at(-1)!, wanted);
  if (type === undefined) return undefined;
  return { name, shape, dtype: 'u8', encoding: { kind: 'ggml', type } };
}

/** The linears whose weights a tensor holds; undefined where one of them is not quantized. */
export function linearsOf({ entry }: GgufTensor, plan: QuantPlan): LinearPlan[] | undefined {
  const { encoding, name } = entry;
  const sources = encoding.kind === 'assembled' ? encoding.parts.map((part) => part.entry.name) : [name];
  const linears = sources.map((source) => plan.linears.get(moduleOf(source)));
  return linears.every((linear) => linear?.scheme !== undefined) ? (linears as LinearPlan[]) : undefined;
}

function highPrecision({ name, shape, entry, staysF32 }: GgufTensor): PlannedTensor {
  const own = elementType(entry);
  const dtype = staysF32 ? 'f32' : own === 'f32' || own === 'f16' ? own : 'bf16';
  return { name, shape, dtype };
}

/** Puts quantized linears where llama.cpp looks for them: rows by rotary pairs, experts in one tensor. */
export class GgufTarget implements Target {
  readonly #plan: QuantPlan;
  readonly #places: ReadonlyMap<string, Place>;
  readonly #tensors: ReadonlyMap<string, StoredWeight>;
  readonly #computed: ReadonlyMap<string, Float32Array>;
  readonly #through: OutputPlan['through'];
  readonly #env: JobEnv;
  readonly #files = new OpenFiles();
  readonly #stacks = new Map<string, { readonly scope: Scope; readonly tensor: Tensor; left: number }>();

  constructor(
    plan: QuantPlan,
    places: ReadonlyMap<string, Place>,
    tensors: readonly GgufTensor[],
    computed: ReadonlyMap<string, Float32Array>,
    through: OutputPlan['through'],
    env: JobEnv,
  ) {
    this.#plan = plan;
    this.#through = through;
    this.#env = env;
    this.#places = places;
    this.#computed = computed;
    this.#tensors = new Map(
      tensors.map(({ name, shape, entry }) => [
        name,
        { name, shape, entry, sources: [name], files: [entry.span.path] },
      ]),
    );
  }

  store(scope: Scope, { linear }: LinearPlan, scheme: Scheme, coded: Coded, source: Source): Stored {
    const place = this.#places.get(linear.name);
    const own = this.#plan.linears.get(linear.name)?.scheme?.blocks;
    // Beside other formats: what no block type divides is written with what is not quantized.
    if (!own) return { tensors: [] };
    if (!place) throw bug(`${linear.name} has no place in the GGUF file`);
    if (coded.blocks) return { tensors: this.#place(scope, place, coded.blocks) };
    // Codes of another target's grid: as they are where the type can say them, else rounded anew.
    const same = blocksOfCodes(scope, own, scheme, coded);
    if (same) return { tensors: this.#place(scope, place, same) };
    const blocks = encode(scope, source.weight, own, source.energy);
    const values = decode(scope, blocks, own, source.weight.shape as [number, number], 'f32');
    return { tensors: this.#place(scope, place, blocks), values };
  }

  #place(scope: Scope, { tensor, expert }: Place, blocks: Tensor): Stored['tensors'] {
    const { encoding } = tensor.entry;
    if (expert === undefined) {
      const part = encoding.kind === 'assembled' ? encoding.parts[0] : undefined;
      const rows = part ? arrangedRows(scope, blocks, part) : blocks;
      return [{ name: tensor.name, tensor: rows }];
    }
    const experts = tensor.shape[0]!;
    let stack = this.#stacks.get(tensor.name);
    if (!stack) {
      const own = new Scope(blocks.device);
      stack = { scope: own, tensor: own.empty('u8', [experts, ...blocks.shape]), left: experts };
      this.#stacks.set(tensor.name, stack);
    }
    copyInto(stack.tensor.at(expert), blocks);
    return --stack.left === 0 ? [{ name: tensor.name, tensor: stack.tensor }] : [];
  }

  /** Frees what a block's experts were gathered in. */
  #release(): void {
    for (const { scope } of this.#stacks.values()) scope[Symbol.dispose]();
    this.#stacks.clear();
  }

  async writeThrough(block: number, writer: TensorSink): Promise<void> {
    this.#release();
    const env = this.#env;
    const open = { tensors: this.#tensors, file: (path: string) => this.#files.get(path) };
    const loader = new TensorLoader(open, env.device);
    for (const { planned } of this.#through.get(block) ?? []) {
      const values = this.#computed.get(planned.name);
      if (values) {
        await writer.write(planned.name, bytesSource(new Uint8Array(values.buffer)));
        continue;
      }
      const { entry } = this.#tensors.get(planned.name)!;
      if (entry.encoding.kind === 'plain' && entry.encoding.dtype === planned.dtype && !entry.strides) {
        await writer.write(planned.name, fileSource(entry.span));
        continue;
      }
      using scope = new Scope(env.device);
      if (planned.encoding?.kind === 'ggml') {
        const wide = scope.empty('f32', planned.shape);
        await loader.load([{ name: planned.name, into: wide }]);
        await writer.write(planned.name, encode(scope, wide, planned.encoding.type).source());
        continue;
      }
      const into = scope.empty(planned.dtype, planned.shape);
      await loader.load([{ name: planned.name, into }]);
      await writer.write(planned.name, into.source());
    }
  }

  async close(): Promise<void> {
    this.#release();
    await this.#files.close();
  }
}

/** Rows of blocks in another order: the arrangement of the values, with a row's bytes in place of its columns. */
function arrangedRows(
  scope: Scope,
  blocks: Tensor,
  { view, axes }: { readonly view: readonly number[]; readonly axes: readonly number[] },
): Tensor {
  const shape = view.with(-1, blocks.dim(1));
  if (elementCount(shape) !== elementCount(blocks.shape) || axes.at(-1) !== axes.length - 1) {
    throw bug('Rows of a quantized linear cannot be arranged', { got: `[${view.join(', ')}]` });
  }
  const strides = shape.map((_, d) => elementCount(shape.slice(d + 1)));
  const arranged = new Tensor(
    blocks.storage,
    blocks.byteOffset,
    blocks.dtype,
    axes.map((d) => shape[d]!),
    axes.map((d) => strides[d]!),
  );
  return cast(scope, arranged, 'u8');
}
