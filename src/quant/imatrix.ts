import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import type { OpenModel } from '../arch/open.js';
import type { GgufMetadata } from '../checkpoint/gguf-config.js';
import { planGguf } from '../checkpoint/gguf-model.js';
import type { PlannedTensor, TensorSink } from '../checkpoint/types.js';
import { bytesSource } from '../base/io.js';
import { readImatrix } from '../targets/imatrix.js';
import { linearsOf } from './gguf.js';
import { plannedBytes, type OutputPlan, type OutputTensor } from './output.js';
import type { QuantPlan } from './plan.js';
import type { Target } from './target.js';

interface Entry {
  readonly name: string;
  readonly experts: number;
  readonly columns: number;
  readonly sums: Float32Array;
  readonly counts: Float32Array;
}

export interface ImatrixOutput {
  readonly plan: OutputPlan;
  readonly metadata: GgufMetadata;
  target(): Target;
}

/**
 * llama.cpp's importance matrix in its GGUF form: for each quantized tensor the sums of squared activations of its input
 * channels, `X.in_sum2` [experts, K], and how many tokens they are of, `X.counts` [experts, 1].
 */
export async function planImatrix(open: OpenModel, plan: QuantPlan): Promise<ImatrixOutput> {
  const { tensors } = await planGguf(open.checkpoint, 'q4_k_s');
  const places = new Map<string, { readonly entry: Entry; readonly expert: number }>();
  const out: OutputTensor[] = [];
  const entries = new Map<number, Entry[]>();
  for (const tensor of tensors) {
    const linears = linearsOf(tensor, plan);
    if (linears === undefined) continue;
    const [experts, columns] = [linears.length, linears[0]!.linear.inFeatures];
    const entry: Entry = {
      name: tensor.name,
      ...{ experts, columns, sums: new Float32Array(experts * columns), counts: new Float32Array(experts) },
    };
    linears.forEach(({ linear }, expert) => places.set(linear.name, { entry, expert }));
    const block = Number(/^blk\.(\d+)\./.exec(tensor.name)?.[1] ?? -1);
    entries.set(block, [...(entries.get(block) ?? []), entry]);
    const planned = (part: string, width: number): PlannedTensor => ({
      name: `${tensor.name}.${part}`,
      shape: experts > 1 ? [experts, width] : [width],
      dtype: 'f32',
    });
    for (const one of [planned('in_sum2', columns), planned('counts', 1)]) {
      out.push({ planned: one, origin: { kind: 'linear', name: linears[0]!.linear.name } });
    }
  }
  const metadata: GgufMetadata = new Map([
    ['general.type', { type: 'string', value: 'imatrix' }],
    ['imatrix.datasets', { type: 'array', of: 'string', value: ['deepseek-convert calibration'] }],
    // Each tensor has its own count of tokens; one chunk stands for all of them.
    ['imatrix.chunk_count', { type: 'u32', value: 1 }],
    ['imatrix.chunk_size', { type: 'u32', value: 512 }],
  ]);
  const bytes = out.reduce((sum, { planned }) => sum + plannedBytes(planned), 0);
  const write = async (block: number, writer: TensorSink): Promise<void> => {
    for (const { name, sums, counts } of entries.get(block) ?? []) {
      await writer.write(`${name}.in_sum2`, bytesSource(new Uint8Array(sums.buffer)));
      await writer.write(`${name}.counts`, bytesSource(new Uint8Array(counts.buffer)));
    }
  };
  return {
    plan: { tensors: out, through: new Map(), bytes },
    metadata,
    target: () => ({
      store: (_scope, { linear }, _scheme, _coded, { statistics }) => {
        const { entry, expert } = places.get(linear.name)!;
        if (statistics) {
          entry.counts[expert] = statistics.tokens;
          const energy = statistics.energy.subarray(0, entry.columns);
          energy.forEach((value, k) => (entry.sums[expert * entry.columns + k] = value * statistics.tokens));
        }
        return { tensors: [] };
      },
      writeThrough: write,
    }),
  };
}

/** Reads the finished file as `convert --imatrix` does: how many tensors it knows. */
export async function verifyImatrix(folder: string): Promise<number> {
  const [name] = (await readdir(folder)).filter((file) => file.endsWith('.gguf'));
  return (await readImatrix(join(folder, name!))).size;
}
