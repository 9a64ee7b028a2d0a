import { join } from 'node:path';
import type { Model } from '../../src/arch/types.js';
import { cacheShape } from '../../src/targets/onnx/attention.js';

interface OrtTensor {
  readonly data: Float32Array | BigInt64Array;
  readonly dims: readonly number[];
}
interface Session {
  readonly outputNames: readonly string[];
  run(feeds: Record<string, OrtTensor>): Promise<Record<string, OrtTensor>>;
  release(): Promise<void>;
}
interface Ort {
  readonly InferenceSession: { create(path: string, options: object): Promise<Session> };
  readonly Tensor: new (type: string, data: unknown, dims: readonly number[]) => OrtTensor;
}

/** onnxruntime-node, which is installed for these tests only. */
export async function loadOrt(): Promise<Ort> {
  const name: string = 'onnxruntime-node';
  const found = (await import(name)) as { default?: Ort } & Ort;
  return found.default ?? found;
}

/** One exported model in ONNX Runtime, with its cache. */
export class OnnxSession {
  private constructor(
    readonly ort: Ort,
    readonly session: Session,
    readonly model: Model,
    readonly type: 'float32' | 'float16',
  ) {}

  static async open(folder: string, model: Model, type: 'float32' | 'float16' = 'float32'): Promise<OnnxSession> {
    const ort = await loadOrt();
    const session = await ort.InferenceSession.create(join(folder, 'model.onnx'), {
      intraOpNumThreads: 1,
      logSeverityLevel: 3,
    });
    return new OnnxSession(ort, session, model, type);
  }

  /** Logits of each piece of the rows [B, S], one call a piece, the cache handed on: [pieces][B s V]. */
  async run(tokens: Int32Array, batch: number, pieces: readonly number[]): Promise<Float32Array[]> {
    const { Tensor } = this.ort;
    const length = tokens.length / batch;
    let past: Record<string, OrtTensor> = {};
    this.model.blocks.forEach((block, i) => {
      const { heads, width } = cacheShape(block.attention)!;
      const empty = this.type === 'float32' ? new Float32Array(0) : new Uint16Array(0);
      for (const part of ['key', 'value']) past[`past_key_values.${i}.${part}`] = new Tensor(this.type, empty, [batch, heads, 0, width]); // prettier-ignore
    });
    const out: Float32Array[] = [];
    let at = 0;
    for (const size of pieces) {
      const ids = new BigInt64Array(batch * size);
      for (let b = 0; b < batch; b++) for (let s = 0; s < size; s++) ids[b * size + s] = BigInt(tokens[b * length + at + s]!); // prettier-ignore
      at += size;
      const results = await this.session.run({
        input_ids: new Tensor('int64', ids, [batch, size]),
        attention_mask: new Tensor('int64', new BigInt64Array(batch * at).fill(1n), [batch, at]),
        ...past,
      });
      out.push(results.logits!.data as Float32Array);
      past = Object.fromEntries(
        Object.entries(results)
          .filter(([name]) => name.startsWith('present.'))
          .map(([name, tensor]) => [name.replace('present.', 'past_key_values.'), tensor]),
      );
    }
    return out;
  }

  close(): Promise<void> {
    return this.session.release();
  }
}
