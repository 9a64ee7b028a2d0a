import { badInput } from '../base/errors.js';
import type { Model } from '../arch/types.js';
import type { QuantFormat } from './formats.js';
import type { QuantPlan } from './plan.js';

/** vLLM and SGLang split these by tensor parallelism; llama.cpp and ONNX Runtime don't. */
const splitting: readonly QuantFormat[] = ['compressed-tensors', 'gptq', 'awq', 'safetensors'];
/** Linears split along their inputs: each GPU must get whole groups, or a scale would belong to two of them. */
const rowParallel = /\.(o_proj|down_proj|w2|out_proj)$/;

/**
 * Whether the output divides into each of the tensor-parallel sizes, as vLLM's loaders want it: heads, whole groups of
 * linears that are split along their inputs, whole words of those that are split along their outputs.
 * Errors: the first size that does not fit, with every linear in its way.
 */
export function requireShares(
  plan: QuantPlan,
  model: Model,
  formats: readonly QuantFormat[],
  sizes: readonly number[],
): void {
  if (sizes.length === 0) return;
  if (!formats.some((format) => splitting.includes(format))) {
    throw badInput('--tp says nothing of these formats: their engines do not split linears', {
      got: formats.join(', '),
      expected: splitting.join(', '),
    });
  }
  for (const size of sizes) {
    const reasons = model.heads % size === 0 ? [] : [`${model.heads} attention heads`];
    if (model.kvHeads % size !== 0 && size % model.kvHeads !== 0) reasons.push(`${model.kvHeads} key/value heads`);
    for (const { linear, stored, scheme } of plan.linears.values()) {
      if (scheme === undefined) continue;
      const { inFeatures: k, outFeatures: n } = stored;
      const group = scheme.group === 0 ? 1 : scheme.group;
      const words = 32 / scheme.bits;
      if (rowParallel.test(linear.name)) {
        if (k % (size * group) !== 0) reasons.push(`${linear.name}: ${k} columns in groups of ${group}`);
      } else if (n % (size * words) !== 0) reasons.push(`${linear.name}: ${n} rows in words of ${words}`);
    }
    if (reasons.length === 0) continue;
    throw badInput(`The output would not divide among ${size} GPUs`, {
      where: reasons.slice(0, 4).join('; ') + (reasons.length > 4 ? ` and ${reasons.length - 4} more` : ''),
      expected: `whole groups for each of ${size}`,
      hint: 'Choose a smaller --group-size, or fewer GPUs in --tp.',
    });
  }
}
