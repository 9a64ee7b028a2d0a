import { availableParallelism } from 'node:os';
import type { ByteSource } from '../base/bytes.js';
import { ConvertError, badInput } from '../base/errors.js';
import { dtypeSize, elementCount } from '../base/dtype.js';
import { Job, type Json } from '../base/job.js';
import { tool } from '../base/version.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import { TensorLoader } from '../arch/load.js';
import { rotationEntry } from '../arch/rotate.js';
import type { CheckpointWriter, TensorEntry } from '../checkpoint/types.js';
import { createWriter } from '../checkpoint/writer.js';
import { cast, encode, normAdd, type EncodableName } from '../tensor/ops.js';
import { Scope, Tensor } from '../tensor/tensor.js';
import { checkFusions, type FusionReport } from './fuse-check.js';
import { merged } from './merge-lora.js';
import { Budget, interleaved, piecesOf, type Piece } from './pieces.js';
import { repacked } from './repack.js';
import type { ConvertOptions, ConvertPlan, PlannedConversion } from './convert-plan.js';

export interface ConvertRun extends ConvertOptions {
  readonly out: string;
  readonly overwrite: boolean;
  readonly restart: boolean;
  readonly shardSize: number;
  /** Bytes for reads and writes in flight. */
  readonly ioBudget: number;
  /** Values beyond the new type's range may become infinite; without this they fail the conversion. */
  readonly allowSaturation: boolean;
  /** Goes into the provenance. */
  readonly recipe: Json;
  readonly resumeHint: string;
}

export interface ConvertReport {
  readonly tensors: number;
  readonly reads: number;
  readonly writes: number;
  /** Values that were finite and became infinite, by tensor. */
  readonly saturated: Readonly<Record<string, number>>;
  /** Linears that were fused, split or folded; of an output that had its name already: none. */
  readonly fused: readonly FusionReport[];
  /** Went on with an earlier run's work. */
  readonly resumed: boolean;
}

/** Bytes of a file that are one read. Large enough for a disk, small enough that memory does not follow tensor sizes. */
const pieceBytes = 4 * 2 ** 20;
/** Bytes after which what is written is made durable: the disk works while we do, and little is lost by a crash. */
const flushEvery = 5e8;
const tensorsAtOnce = 8;
/** Output files that grow at once: a file's copies and checksum take a core each, a disk takes some in parallel. */
const filesAtOnce = Math.min(4, Math.max(1, Math.floor(availableParallelism() / 4)));

/** Bytes of one copy from file to file, which needs no memory: after each an interruption is noticed. */
const copyBytes = 32 * 2 ** 20;

/**
 * Writes what is planned: tensors stream through the device in pieces, reads and writes of several overlap. An
 * interrupted run goes on where it stopped.
 * Errors: input (non-finite weights, files that change meanwhile), gate (values beyond the new type's range),
 * resource (disk, memory), interrupted.
 */
export async function runConversion(plan: ConvertPlan, run: ConvertRun, env: JobEnv): Promise<ConvertReport> {
  const { checkpoint } = plan;
  const job = await Job.open({
    out: run.out,
    overwrite: run.overwrite,
    restart: run.restart,
    fingerprint: {
      tool: tool.version,
      command: 'convert',
      input: checkpoint.fingerprint,
      dtype: run.dtype ?? null,
      format: run.format,
      shardSize: run.shardSize,
      ...(run.blocks !== undefined && { blocks: run.blocks }),
      ...(run.fuse !== undefined && run.fuse.size > 0 && { fuse: [...run.fuse].sort() }),
      ...(plan.adapter && { adapter: plan.adapter.hash }),
      ...(plan.imatrixHash !== undefined && { imatrix: plan.imatrixHash }),
      ...(run.modelParallel !== undefined && { modelParallel: run.modelParallel }),
    },
  });
  try {
    if (!job.finished) return await convertInto(job, plan, run, env);
    const sum = (of: 'reads' | 'writes') => plan.tensors.reduce((n, tensor) => n + tensor[of], 0);
    await job.remove();
    return {
      tensors: plan.tensors.length,
      reads: sum('reads'),
      writes: sum('writes'),
      saturated: {},
      fused: [],
      resumed: true,
    };
  } catch (error) {
    // What is wrong with the input is still wrong next time: nothing is worth keeping.
    const final = error instanceof ConvertError && (error.kind === 'input' || error.kind === 'gate');
    await (final && !job.resumed ? job.remove() : job.close());
    throw error;
  }
}

async function convertInto(job: Job, plan: ConvertPlan, run: ConvertRun, env: JobEnv): Promise<ConvertReport> {
  const { checkpoint, fusions = [] } = plan;
  let fused: readonly FusionReport[] = [];
  const writer = await createWriter({
    job,
    format: run.format,
    tensors: plan.outputs,
    shardSize: run.shardSize,
    config: plan.config,
    companions: checkpoint.companions,
    extraFiles: new Map([...checkpoint.extraFiles, ...(plan.extraFiles ?? [])]),
    ...(plan.onnx && { onnx: plan.onnx }),
    ...(plan.gguf && { gguf: plan.gguf }),
    // DeepSeek's own converter writes no metadata.
    ...(run.format === 'deepseek-native' && { metadata: {} }),
    provenance: { tool, recipe: run.recipe, inputs: [...checkpoint.files] },
    ...(fusions.length > 0 && {
      accept: async ({ path }): Promise<Json> => {
        fused = await checkFusions(plan, path, env);
        return { fused: JSON.parse(JSON.stringify(fused)) as Json };
      },
    }),
  });
  try {
    const left = plan.tensors.filter(({ name }) => !writer.has(name));
    const resumed = left.length < plan.tensors.length;
    if (resumed)
      env.log.info(`Going on: ${plan.tensors.length - left.length} of ${plan.tensors.length} tensors are done.`);
    const saturated = await new Converter(plan, run, env, writer).all(left);
    await writeComputed(plan, env, writer);
    await checkpoint.assertUnchanged();
    refuseSaturation(saturated, run);
    const report = { tensors: plan.tensors.length, saturated };
    await writer.finish({ ...report, ...(await rotationEntry(checkpoint.path)) });
    await job.remove();
    const sum = (of: 'reads' | 'writes') => plan.tensors.reduce((n, tensor) => n + tensor[of], 0);
    return { ...report, fused, reads: sum('reads'), writes: sum('writes'), resumed };
  } finally {
    await writer.close();
  }
}

/** Rotary tables and the like, in the precision that is planned for them. */
async function writeComputed(plan: ConvertPlan, env: JobEnv, writer: CheckpointWriter): Promise<void> {
  const planned = new Map(plan.outputs.map((tensor) => [tensor.name, tensor]));
  for (const [name, values] of plan.computed) {
    using scope = new Scope(env.device);
    const { shape, dtype } = planned.get(name)!;
    await writer.write(name, cast(scope, scope.from('f32', shape, values), dtype).source());
  }
}

function refuseSaturation(saturated: Readonly<Record<string, number>>, { dtype, allowSaturation }: ConvertRun): void {
  const names = Object.keys(saturated);
  if (names.length === 0 || allowSaturation) return;
  const values = Object.values(saturated).reduce((a, b) => a + b, 0);
  throw new ConvertError('gate', `Weights are too large for ${dtype}`, {
    where: `tensor ${names[0]}${names.length > 1 ? ` and ${names.length - 1} more` : ''}`,
    got: `${values} values that would become infinite`,
    expected: 'none',
    hint: 'Use --dtype bf16, which has the range of f32, or --allow-saturation to accept them.',
  });
}

class Converter {
  readonly #loader: TensorLoader;
  readonly #budget: Budget;
  readonly #saturated: Record<string, number> = {};
  readonly #turns = new Map<number, Promise<void>>();

  constructor(
    readonly plan: ConvertPlan,
    readonly run: ConvertRun,
    readonly env: JobEnv,
    readonly writer: CheckpointWriter,
  ) {
    this.#loader = new TensorLoader(plan.source, env.device);
    this.#budget = new Budget(run.ioBudget);
  }

  /** Converts the tensors, several at once; gives the saturation counts. */
  async all(left: readonly PlannedConversion[]): Promise<Record<string, number>> {
    const tensors = interleaved(left, ({ name }) => this.writer.fileOf(name), filesAtOnce);
    const total = this.plan.tensors.length;
    let [next, done, sinceFlush] = [0, total - tensors.length, 0];
    let flushing = false;
    let failure: { error: unknown } | undefined;
    const worker = async (): Promise<void> => {
      while (next < tensors.length && !failure && !this.env.signal.aborted) {
        const tensor = tensors[next++]!;
        await this.#one(tensor);
        sinceFlush += tensor.writes;
        this.env.log.progress({ stage: 'convert', done: ++done, total });
        if (sinceFlush >= flushEvery && !flushing) {
          [sinceFlush, flushing] = [0, true];
          await this.writer.flush();
          flushing = false;
        }
      }
    };
    // All workers end before an error is thrown: transfers under way hold device memory.
    const ends = Array.from({ length: tensorsAtOnce }, () =>
      worker().catch((error: unknown) => {
        failure ??= { error };
      }),
    );
    await Promise.all(ends);
    if (failure) throw failure.error;
    if (this.env.signal.aborted) await this.writer.flush();
    stopIfAborted(this.env, this.run.resumeHint);
    return this.#saturated;
  }

  async #one(tensor: PlannedConversion): Promise<void> {
    const { device } = this.env;
    using scope = new Scope(device);
    const counts = scope.from('i64', [2], new BigInt64Array(2));
    const finite = scope.zeros('f32', [2]);
    let odd = 0;
    const source = {
      copy: () => this.#copied(tensor, (values) => (odd += values)),
      cast: () => this.#streamed(tensor, counts),
      decode: () => this.#decoded(tensor, counts),
      encode: () => this.#encoded(tensor, finite),
      repack: () => repacked(tensor, this.plan, device),
    }[tensor.action]();
    await this.writer.write(tensor.name, source);
    const [saturated, nonFinite] = new BigInt64Array((await counts.bytesOut()).buffer);
    odd += Number(nonFinite!) + (await finite.float32())[1]!;
    if (odd > 0) throw this.#notFinite(tensor, odd);
    if (saturated! > 0n) this.#saturated[tensor.name] = Number(saturated);
  }

  #notFinite({ name, entry }: PlannedConversion, values: number): ConvertError {
    return badInput(`Weights are not finite: tensor ${name}`, {
      where: entry.span.path,
      got: `${values} ${values === 1 ? 'value that is' : 'values that are'} infinite or not a number`,
      expected: 'finite weights',
      hint: 'The checkpoint is damaged or its training diverged: no output made from it would work.',
    });
  }

  /** The bytes as they are, from file to file. */
  #copied({ entry: { span, encoding } }: PlannedConversion, odd: (values: number) => void): ByteSource {
    const dtype = encoding.kind === 'plain' ? encoding.dtype : 'u8';
    return {
      byteLength: span.bytes,
      writeTo: (fd, position) =>
        this.#inTurn(fd, async () => {
          const { fd: from } = await this.plan.source.file(span.path);
          for (let at = 0; at < span.bytes; at += copyBytes) {
            stopIfAborted(this.env, this.run.resumeHint);
            const bytes = Math.min(copyBytes, span.bytes - at);
            const target = { fd, position: position + at };
            odd(await this.env.device.copyRange({ fd: from, position: span.offset + at }, target, bytes, dtype));
          }
        }),
    };
  }

  /** One at a time for each output file: a file system lets one writer in, the others would spin. */
  async #inTurn(fd: number, work: () => Promise<void>): Promise<void> {
    const before = this.#turns.get(fd) ?? Promise.resolve();
    const turn = before.then(work);
    this.#turns.set(fd, turn.catch(() => undefined)); // prettier-ignore
    await turn;
  }

  /** Piece by piece from file to file through the device; element-wise, so that a piece needs no other. */
  #streamed({ entry, output }: PlannedConversion, counts: Tensor): ByteSource {
    const { device } = this.env;
    const { span, shape } = entry;
    const from = entry.encoding.kind === 'plain' ? entry.encoding.dtype : 'u8';
    const to = output.dtype;
    const elements = elementCount(shape);
    const size = dtypeSize(from);
    const step = pieceBytes / size;
    const piece = async (fd: number, position: number, start: number): Promise<void> => {
      const count = Math.min(step, elements - start);
      using scope = new Scope(device);
      const read = scope.empty(from, [count]);
      const file = await this.plan.source.file(span.path);
      await device.readFile(read.buffer, read.byteOffset, file.fd, span.offset + start * size, count * size);
      await cast(scope, read, to, counts)
        .source()
        .writeTo(fd, position + start * dtypeSize(to));
    };
    return {
      byteLength: elements * dtypeSize(to),
      writeTo: async (fd, position) => {
        const starts = Array.from({ length: Math.ceil(elements / step) }, (_, i) => i * step);
        let failure: { error: unknown } | undefined;
        const run = (start: number) =>
          // A piece takes its bytes as read and as written.
          this.#budget.within(step * (size + dtypeSize(to)), async () => {
            if (failure || this.env.signal.aborted) return;
            await piece(fd, position, start).catch((error: unknown) => (failure ??= { error }));
          });
        await Promise.all(starts.map(run));
        if (failure) throw failure.error;
        stopIfAborted(this.env, this.run.resumeHint);
      },
    };
  }

  /** Blocks and views, as few rows at a time as they allow. */
  #decoded(tensor: PlannedConversion, counts: Tensor): ByteSource {
    const { output, shape } = tensor;
    const size = dtypeSize(output.dtype);
    return this.#inPieces(tensor, elementCount(shape) * size, async (scope, piece, fd, position) => {
      const read = await this.#load(scope, tensor, piece.entry);
      const { adapter } = this.plan;
      const value = tensor.merge && adapter ? await merged(scope, read, tensor.merge, this.#loader, adapter) : read;
      const arranged = tensor.transposed ? value.transpose() : value;
      await cast(scope, arranged, output.dtype, counts)
        .source()
        .writeTo(fd, position + piece.start * size);
    });
  }

  /** GGML blocks, which lie along rows. */
  #encoded(tensor: PlannedConversion, finite: Tensor): ByteSource {
    const rate = tensor.writes / elementCount(tensor.shape);
    return this.#inPieces(tensor, tensor.writes, async (scope, piece, fd, position) => {
      const value = scope.empty('f32', piece.entry.shape);
      await this.#loadPiece(tensor.name, piece.entry, value);
      normAdd(finite, value);
      const columns = tensor.shape.at(-1)!;
      const rows = value.view(-1, columns);
      const { experts, values } = tensor.importance ?? { experts: 1, values: undefined };
      // Each expert's rows count by what that expert sees; a piece may end in the middle of one.
      const each = elementCount(tensor.shape) / columns / experts;
      const first = piece.start / columns;
      for (let from = 0; from < rows.dim(0);) {
        const e = Math.floor((first + from) / each);
        const to = Math.min(rows.dim(0), (e + 1) * each - first);
        const weight = values && scope.from('f32', [columns], values.subarray(e * columns, (e + 1) * columns));
        const blocks = encode(scope, rows.slice(0, from, to), tensor.to as EncodableName, weight);
        await blocks.source().writeTo(fd, position + (piece.start + from * columns) * rate);
        from = to;
      }
    });
  }

  /** Runs `work` for each piece of a tensor, as many at once as the budget allows. */
  #inPieces(
    { name, entry, shape, transposed, repack, merge }: PlannedConversion,
    byteLength: number,
    work: (scope: Scope, piece: Piece, fd: number, position: number) => Promise<void>,
  ): ByteSource {
    const stays =
      transposed === true ||
      repack !== undefined ||
      merge !== undefined ||
      this.plan.source.tensors.get(name)?.linear !== undefined;
    const cuts = stays ? [] : piecesOf(entry, pieceBytes);
    const pieces = cuts.every((piece) => piece.entry.shape.at(-1) === shape.at(-1)) ? cuts : [];
    if (pieces.length < 2) pieces.splice(0, 1, { entry: { ...entry, shape }, start: 0 });
    return {
      byteLength,
      writeTo: async (fd, position) => {
        let failure: { error: unknown } | undefined;
        const one = async (piece: Piece): Promise<void> => {
          if (failure || this.env.signal.aborted) return;
          using scope = new Scope(this.env.device);
          await work(scope, piece, fd, position).catch((error: unknown) => (failure ??= { error }));
        };
        // What is read, its values in fp32 (twice where they are put together), what is written.
        const cost = ({ entry }: Piece) => entry.span.bytes + 12 * elementCount(entry.shape);
        await Promise.all(pieces.map((piece) => this.#budget.within(cost(piece), () => one(piece))));
        if (failure) throw failure.error;
        stopIfAborted(this.env, this.run.resumeHint);
      },
    };
  }

  async #load(scope: Scope, { name, output }: PlannedConversion, entry: TensorEntry): Promise<Tensor> {
    const { device } = this.env;
    const { encoding, strides, span, shape } = entry;
    if (encoding.kind === 'plain' && strides) {
      const size = dtypeSize(encoding.dtype);
      const flat = scope.empty(encoding.dtype, [span.bytes / size]);
      const file = await this.plan.source.file(span.path);
      if (span.bytes > 0) await device.readFile(flat.buffer, flat.byteOffset, file.fd, span.offset, span.bytes);
      return new Tensor(flat.storage, flat.byteOffset, encoding.dtype, shape, strides);
    }
    // Through fp32, so that what a narrower type cannot hold is counted.
    const wide = output.dtype === 'bf16' || output.dtype === 'f16' ? 'f32' : output.dtype;
    const value = scope.empty(wide, shape);
    await this.#loadPiece(name, entry, value);
    return value;
  }

  /** A tensor, or some of its rows as if they were one. */
  #loadPiece(name: string, entry: TensorEntry, into: Tensor): Promise<void> {
    const stored = this.plan.source.tensors.get(name)!;
    const { file } = this.plan.source;
    const tensors = new Map([[name, stored.linear ? stored : { ...stored, entry, shape: entry.shape }]]);
    return new TensorLoader({ tensors, file }, this.env.device).load([{ name, into }]);
  }
}
