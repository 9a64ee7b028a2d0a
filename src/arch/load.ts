import { ConvertError, badInput, bug } from '../base/errors.js';
import { dtypeSize, elementCount, type DType } from '../base/dtype.js';
import type { Device } from '../backend/device.js';
import { joinedShape } from '../formats/assembly.js';
import type { LinearFactor, TensorEntry, Turn } from '../formats/types.js';
import { binary, copyInto, decode, dequantize, fill, gemm } from '../tensor/ops.js';
import { Scope, Tensor } from '../tensor/tensor.js';
import { rotateOutputs, rotateRows } from './hadamard.js';
import type { OpenModel } from './open.js';

/** Reads in flight: enough to keep a disk and the I/O threads busy, few enough to bound staging memory. */
const inFlight = 6;

const floats: ReadonlySet<DType> = new Set(['f32', 'bf16', 'f16', 'f64', 'f8_e4m3', 'f8_e5m2']);
const integerTypes: ReadonlySet<DType> = new Set(['i64', 'i32', 'u32', 'i16', 'u16', 'u8', 'i8']);

/** A tensor to be read, and the memory (contiguous) that it is to fill. */
export interface LoadJob {
  readonly name: string;
  readonly into: Tensor;
  /** A table of integers: other types are refused. */
  readonly integers?: boolean;
}

/** Brings stored tensors to a device: into memory that the caller has made, converted to its dtype. */
export class TensorLoader {
  readonly #open: Pick<OpenModel, 'tensors' | 'file'>;
  readonly #device: Device;

  constructor(open: Pick<OpenModel, 'tensors' | 'file'>, device: Device) {
    this.#open = open;
    this.#device = device;
  }

  async load(jobs: readonly LoadJob[]): Promise<void> {
    let next = 0;
    let failure: { error: unknown } | undefined;
    const worker = async (): Promise<void> => {
      while (next < jobs.length && !failure) {
        await this.#one(jobs[next++]!).catch((error: unknown) => {
          failure ??= { error };
        });
      }
    };
    // All workers end before an error is thrown: transfers under way hold the caller's memory.
    await Promise.all(Array.from({ length: inFlight }, worker));
    if (failure) throw failure.error;
  }

  async #one({ name, into, integers = false }: LoadJob): Promise<void> {
    const stored = this.#open.tensors.get(name);
    if (!stored) throw bug(`tensor ${name} is not in the checkpoint`);
    using scope = new Scope(this.#device);
    if (stored.linear) {
      const [n, k] = into.shape as [number, number];
      const { codes, grid } = await stored.linear.read(scope, (entry, dtype) => this.raw(scope, entry, dtype), n, k);
      copyInto(into, dequantize(scope, codes, grid, into.dtype as 'f32'));
      return;
    }
    await this.#entry(scope, stored.entry, into, integers ? integerTypes : floats);
  }

  async #entry(scope: Scope, entry: TensorEntry, into: Tensor, allowed = floats): Promise<void> {
    const { encoding, strides } = entry;
    switch (encoding.kind) {
      case 'plain': {
        if (!allowed.has(encoding.dtype)) {
          const what = allowed === floats ? 'A weight has a type that is not a number with a fraction' : 'A table has a type that is not an integer'; // prettier-ignore
          throw badInput(what, {
            where: `${entry.span.path}, tensor ${entry.name}`,
            got: encoding.dtype,
            expected: [...allowed].join(', '),
          });
        }
        if (encoding.dtype === into.dtype && !strides) return this.#read(entry, into);
        if (!strides) {
          copyInto(into, await this.raw(scope, entry, encoding.dtype));
          return;
        }
        const size = entry.span.bytes / dtypeSize(encoding.dtype);
        const flat = scope.empty(encoding.dtype, [size]);
        await this.#read(entry, flat);
        copyInto(into, new Tensor(flat.storage, 0, flat.dtype, entry.shape, strides));
        return;
      }
      case 'ggml': {
        const bytes = scope.empty('u8', [entry.span.bytes]);
        await this.#read(entry, bytes);
        const columns = into.dim(-1);
        const rows = into.count / columns;
        copyInto(into.view(rows, columns), decode(scope, bytes, encoding.type, [rows, columns], into.dtype as 'f32'));
        return;
      }
      case 'scaled': {
        const bytes = scope.empty('u8', [entry.span.bytes]);
        const scaleDType = encoding.scaleElement === 'f8_e8m0' ? 'u8' : encoding.scaleElement;
        const shape = [Math.ceil(into.dim(0) / encoding.block[0]), Math.ceil(into.dim(1) / encoding.block[1])];
        const scale = scope.empty(scaleDType, shape);
        await Promise.all([this.#read(entry, bytes), this.#read(encoding.scale, scale)]);
        const [rows, columns] = into.shape as [number, number];
        const scaled = { scale, block: encoding.block };
        copyInto(into, decode(scope, bytes, encoding.element, [rows, columns], into.dtype as 'f32', scaled));
        return;
      }
      case 'assembled': {
        let at = 0;
        const joined = joinedShape(encoding.parts, encoding.axis);
        for (const { entry: part, view, cut, axes } of encoding.parts) {
          using temporary = new Scope(this.#device);
          const whole = temporary.empty(into.dtype, part.shape);
          await this.#entry(temporary, part, whole);
          const seen = whole.view(...view);
          const piece = permute(cut ? seen.slice(cut.axis, cut.from, cut.to) : seen, axes);
          const end = at + piece.dim(encoding.axis);
          copyInto(into.view(...joined).slice(encoding.axis, at, end), piece);
          at = end;
        }
        return;
      }
      case 'product': {
        const { weight, bias } = await this.#product(scope, encoding.factors);
        copyInto(into, encoding.part === 'weight' ? weight : bias!.view(into.count));
        return;
      }
      case 'rotated': {
        const w = into.dtype === 'f32' ? into : scope.empty('f32', into.shape);
        await this.#entry(scope, encoding.of, w);
        for (const turn of encoding.turns) await this.#turn(scope, w, turn);
        if (w !== into) copyInto(into, w);
        return;
      }
      case 'opaque':
        throw badInput('A weight is stored in a way that cannot be computed with', {
          where: `${entry.span.path}, tensor ${entry.name}`,
          got: encoding.name,
        });
    }
  }

  /** One turn of a tensor f32, in place. */
  async #turn(scope: Scope, w: Tensor, turn: Turn): Promise<void> {
    if (turn.side === 'norm') return fill(w, 1);
    if (turn.side === 'outputs') return rotateOutputs(w, turn);
    if (turn.gain) {
      const gain = scope.empty('f32', [1, w.dim(1)]);
      await this.#entry(scope, turn.gain, gain.view(-1));
      binary(scope, 'mul', w, gain, { out: w });
    }
    rotateRows(w.view(-1, turn.rotation.size), turn.rotation);
  }

  /** Linears in a row as one, in f32: the matrix [N, K] and the bias [N, 1]. */
  async #product(
    scope: Scope,
    factors: readonly LinearFactor[],
  ): Promise<{ weight: Tensor; bias: Tensor | undefined }> {
    const read = async (entry: TensorEntry, shape: readonly number[]): Promise<Tensor> => {
      const tensor = scope.empty('f32', entry.shape);
      await this.#entry(scope, entry, tensor);
      return tensor.view(...shape);
    };
    let product: Tensor | undefined;
    let sum: Tensor | undefined;
    for (const { weight, bias } of factors) {
      const w = await read(weight, weight.shape);
      const own = bias && (await read(bias, [bias.shape[0]!, 1]));
      const moved: Tensor | undefined = sum && gemm(scope, w, sum);
      sum = moved && own ? binary(scope, 'add', moved, own) : (moved ?? own);
      product = product ? gemm(scope, w, product) : w;
    }
    return { weight: product!, bias: sum };
  }

  /** A stored tensor as it is on disk, under its own shape. */
  async raw(scope: Scope, entry: TensorEntry, dtype: DType): Promise<Tensor> {
    const tensor = scope.empty(dtype, entry.shape);
    if (entry.strides) throw bug(`raw read of ${entry.name}, which is a view`);
    await this.#read(entry, tensor);
    return tensor;
  }

  async #read({ name, span }: TensorEntry, into: Tensor): Promise<void> {
    const bytes = elementCount(into.shape) * dtypeSize(into.dtype);
    if (bytes !== span.bytes) {
      throw badInput('A tensor does not have the size that its shape asks for', {
        where: `${span.path}, tensor ${name}`,
        got: `${span.bytes} bytes`,
        expected: `${bytes} bytes for ${into.dtype} [${into.shape.join(', ')}]`,
      });
    }
    if (bytes === 0) return;
    const file = await this.#open.file(span.path);
    try {
      await this.#device.readFile(into.buffer, into.byteOffset, file.fd, span.offset, bytes);
    } catch (error) {
      if (!(error instanceof ConvertError) || error.kind !== 'input') throw error;
      throw badInput(error.message.split('\n')[0]!, {
        where: `${span.path}, tensor ${name}`,
        expected: `${bytes} bytes from byte ${span.offset} on`,
        ...(error.facts.hint !== undefined && { hint: error.facts.hint }),
        cause: error,
      });
    }
  }
}

const permute = (x: Tensor, axes: readonly number[]): Tensor =>
  new Tensor(x.storage, x.byteOffset, x.dtype, axes.map((d) => x.dim(d)), axes.map((d) => x.strides[d]!)); // prettier-ignore
