import { formatBytes } from '../base/files.js';
import { columns, count, short } from '../base/text.js';
import type { Model } from '../arch/types.js';
import type { Storage } from '../quant/footprint.js';
import type { Figures, Wanted } from './advise-figures.js';
import type { Gpu, Hardware } from './hardware.js';

/** Every figure of one choice with its formula and the numbers in it. */
export function explain(
  model: Model,
  f: Figures,
  gpu: Gpu,
  { efficiency, date }: Hardware,
  wanted: Wanted & { readonly prefill: number },
): string {
  const { print, gpus } = f;
  const { context, sequences, utilization } = wanted;
  const tokens = Math.max(sequences, Math.min(wanted.prefill, context));
  const share = 1 - (1 - print.activeShare) ** sequences;
  const parameters = short(Math.round(print.activeParameters));
  const rows: [string, string][] = [
    ['weights', `${storageFormula(f.scheme.storage)}; sum over all tensors = ${formatBytes(print.weights)}, / ${gpus} GPU = ${formatBytes(f.weights)}`],
    ['KV cache', `2 B x values cached by ${context} tokens (${cachedFormula(model, gpus)}) x ${sequences} sequences = ${formatBytes(f.cache)}`],
    ['activations', `2 B x ${tokens} tokens x (2 x ${model.stateWidth} + outputs of the widest half of a block) + 4 B x ${sequences} x ${model.vocab} logits = ${formatBytes(f.activations)}`],
    ['usable', `${gpu.memoryGB} GB x ${utilization} = ${formatBytes(f.usable)} (${gpu.source}, ${date})`],
    ['sequences', `(usable - weights - activations) / KV cache of one = ${count(f.mostSequences)}`],
    ['read a step', `always ${formatBytes(print.always)} + experts ${formatBytes(print.experts)} x (1 - (1 - ${print.activeShare.toPrecision(3)})^${sequences} = ${share.toPrecision(3)}) = ${formatBytes(f.read)}`],
    ['step', `the longer of: (read / ${gpus} + KV cache) / (${gpu.bandwidthGBs} GB/s x ${efficiency.bandwidth}); 2 x ${parameters} active parameters x ${sequences} / (${gpus} x ${gpu.bf16Tflops} TFLOP/s x ${efficiency.compute}) = ${(1000 * f.stepSeconds).toPrecision(3)} ms, bound by ${f.boundBy}`],
    ['tokens/s', `1 / step = ${f.tokensPerSecond.toPrecision(3)} a sequence, ${f.allTokensPerSecond.toPrecision(3)} in all`],
    ['efficiency', efficiency.source],
  ]; // prettier-ignore
  return columns(rows, 'll');
}

function storageFormula(storage: Storage): string {
  if (storage.kind === 'plain') return '2 B a parameter';
  if (storage.kind === 'fp8') return `linears 1 B a weight + 4 B a tile of ${storage.tile.join(' x ')}, the rest 2 B`;
  const group = storage.group === -1 ? 'row' : `group of ${storage.group}`;
  return `linears ${storage.bits}/8 B a weight + 2 B a ${group}, the rest (embedding, head, norms, routers) 2 B`;
}

function cachedFormula(model: Model, gpus: number): string {
  const { attention, window } = model.blocks[0]!;
  const layers = `${model.blocks.length} layers`;
  if (attention.latent) {
    const { rank, rope, indexer } = attention.latent;
    return `${layers} x (latent ${rank} + rotated key ${rope.dim}${indexer ? ` + scorer ${indexer.width}` : ''}), the same on each GPU`; // prettier-ignore
  }
  if (!attention.grouped) return `${layers} of compressed attention`;
  const windowed = window !== undefined || model.blocks.some((block) => block.window !== undefined);
  const divided = gpus > 1 ? ` / ${Math.min(gpus, model.kvHeads)} GPUs` : '';
  return `${layers} x 2 x ${model.kvHeads} heads x ${model.headDim}${divided}${windowed ? ', at most a window of tokens where there is one' : ''}`; // prettier-ignore
}
