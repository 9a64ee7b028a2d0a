import { badInput, ConvertError } from '../base/errors.js';
import type { GgufFileType } from '../checkpoint/gguf-config.js';
import { fromGguf, planGguf, type GgufPlan } from '../checkpoint/gguf-model.js';
import type { Checkpoint } from '../checkpoint/types.js';
import { inverseFrequencies, ropeAmplitude, type RopeSpec } from '../nn/rope.js';
import { coverage } from './coverage.js';
import { modelAsStored } from './open.js';
import { buildModel } from './registry.js';
import { storedWeights } from './stored.js';
import type { Model } from './types.js';

/**
 * What a GGUF file of a checkpoint holds, and that it is the same model: what our reader makes of the planned metadata
 * and tensors computes what the checkpoint's config says.
 * Errors: what `planGguf` refuses; settings that GGUF does not carry.
 */
export async function planGgufModel(checkpoint: Checkpoint, fileType: GgufFileType): Promise<GgufPlan> {
  const plan = await planGguf(checkpoint, fileType);
  const where = checkpoint.configPath ?? checkpoint.path;
  const stored = storedWeights(checkpoint.tensors, undefined);
  const model = await modelAsStored(checkpoint.config, where, stored);
  requireLoads(model, plan, where);
  const found = difference(summary(model), summary(await described(checkpoint, plan)), '');
  if (found === undefined) return plan;
  throw badInput('GGUF does not carry a setting of this model, and llama.cpp would answer differently', {
    where: `${where}, ${found.at}`,
    got: found.wanted,
    expected: `${found.described}, as llama.cpp would compute`,
    hint: 'Use --format safetensors.',
  });
}

/** What the metadata could say but llama.cpp's loaders do not take. */
function requireLoads({ modelType, heads, kvHeads }: Model, { tensors }: GgufPlan, where: string): void {
  if (modelType === 'olmoe' && kvHeads !== heads) {
    throw badInput('llama.cpp runs this architecture with as many key/value heads as heads', {
      where: `${where}, num_key_value_heads`,
      got: `${kvHeads}`,
      expected: `${heads}`,
    });
  }
  const bias = tensors.find(({ name }) => name.endsWith('.attn_output.bias'));
  if (bias !== undefined && !['llama', 'mistral'].includes(modelType)) {
    throw badInput('llama.cpp has no place for a bias of this architecture', { where, got: bias.entry.name });
  }
}

/** The model that a reader of the file would see. */
async function described(checkpoint: Checkpoint, plan: GgufPlan): Promise<Model> {
  const entries = plan.tensors.map(({ name, shape, entry }) => [name, { ...entry, name, shape }] as const);
  try {
    const { config, tensors } = await fromGguf(plan.metadata, new Map(entries), checkpoint.path, undefined, plan.computed); // prettier-ignore
    const stored = storedWeights(tensors, undefined);
    const model = buildModel(config, checkpoint.path, (name) => stored.has(name));
    const specs = [...model.outer, ...model.blocks.flatMap((block) => block.tensors)];
    coverage(model, new Map(specs.map((spec) => [spec.name, spec])), stored, checkpoint);
    return model;
  } catch (error) {
    if (!(error instanceof ConvertError)) throw error;
    throw badInput('GGUF does not carry this model', { where: checkpoint.path, got: error.message });
  }
}

/** What decides a model's answers. */
const summary = ({ hidden, vocab, context, tied, logitCap, norm, head, blocks }: Model): object => ({
  ...{ hidden, vocab, context, tied, logitCap, norm, head },
  blocks: blocks.map(({ norms, attention, ffn, moe, window }) => ({
    ...{ norms, ffn, moe, window },
    ...{ grouped: attention.grouped, latent: attention.latent },
  })),
});

/** Frequencies and amplitude: several descriptions may say the same. */
const turning = (rope: RopeSpec, context: number): object => ({
  ...{ dim: rope.dim, interleaved: rope.interleaved, fromEnd: rope.fromEnd },
  ...{ amplitude: ropeAmplitude(rope), frequencies: [...inverseFrequencies(rope, context)] },
});

interface Difference {
  readonly at: string;
  readonly wanted: string;
  readonly described: string;
}

/** The first difference of two values; numbers that metadata holds as f32 may be rounded. */
function difference(wanted: unknown, described: unknown, at: string): Difference | undefined {
  if (typeof wanted === 'function' || wanted === described) return undefined;
  const isNumber = typeof wanted === 'number' && typeof described === 'number';
  if (isNumber && Math.abs(wanted - described) <= 1e-6 * Math.abs(wanted)) return undefined;
  if (!isRecord(wanted) || !isRecord(described)) return { at, wanted: show(wanted), described: show(described) };
  for (const key of new Set([...Object.keys(wanted), ...Object.keys(described)])) {
    const [a, b] = [wanted[key], described[key]].map((value) => (key === 'rope' && isRecord(value) ? turning(value as unknown as RopeSpec, 1e6) : value)); // prettier-ignore
    const found = difference(a, b, at === '' ? key : `${at}.${key}`);
    if (found) return found;
  }
  return undefined;
}

const isRecord = (value: unknown): value is Record<string, unknown> => typeof value === 'object' && value !== null;
const show = (value: unknown): string => (value === undefined ? 'none' : JSON.stringify(value)).slice(0, 80);
