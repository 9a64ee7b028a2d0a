import { stat } from 'node:fs/promises';
import { dirname, extname, join } from 'node:path';
import { badInput } from '../base/errors.js';
import { readJsonFile } from '../base/files.js';
import type { Json } from '../base/job.js';
import { stemOf } from '../checkpoint/config.js';
import type { Rotation, TensorEntry, Turn } from '../formats/types.js';
import type { LinearSpec } from '../nn/calls.js';
import type { NormSpec } from '../nn/norm.js';
import { hadamardOrder } from './hadamard.js';
import { modelOf, type OpenModel } from './open.js';
import type { Block, FfnSpec } from './types.js';

/** The rotation of a whole model. */
export interface RotatedBy {
  readonly kind: 'hadamard';
  readonly seed: number;
}

/** What an output of this tool was rotated by, as the provenance beside it says. */
export async function rotationOf(path: string): Promise<RotatedBy | undefined> {
  const isFile = extname(path) !== '' && (await stat(path)).isFile();
  const place = isFile
    ? join(dirname(path), `${stemOf(path)}.deepseek-convert.json`)
    : join(path, 'deepseek-convert.json');
  const found = (await readJsonFile(place)) as { rotation?: RotatedBy; recipe?: { recipe?: { rotation?: RotatedBy } } } | undefined; // prettier-ignore
  return found?.rotation ?? found?.recipe?.recipe?.rotation;
}

/** For the provenance of what is made of a model and keeps its hidden states: `rotation`, where they are rotated. */
export async function rotationEntry(path: string): Promise<Record<string, Json>> {
  const found = await rotationOf(path);
  return found === undefined ? {} : { rotation: { kind: found.kind, seed: found.seed } };
}

/** The model with its hidden states as `rotation` turns them, unless they are turned already. */
export async function inBasis(open: OpenModel, rotation: RotatedBy | undefined): Promise<OpenModel> {
  if (rotation === undefined || (await rotationOf(open.checkpoint.path)) !== undefined) return open;
  return rotated(open, rotation.seed);
}

/** What each tensor becomes, by name. */
type Turns = Map<string, Turn[]>;

/**
 * The same function with hidden states rotated (QuaRot, Ashkboos et al. 2024; SpinQuant's R1 and R2, Liu et al. 2024):
 * outliers of single channels spread over all of them, while every engine loads the weights as those of any other
 * model. Rotated are the residual stream, the values of each head between v_proj and o_proj, and the latents of
 * multi-head latent attention. A norm without weights commutes with rotations, so the weights of norms go into the
 * linears behind them, those of the last one into the head, which ceases to be the embedding. Tensors are computed when
 * they are read, in fp32.
 * Errors (kind 'input'): architectures where this does not leave the function as it is, weights stored in codes.
 */
export async function rotated(open: OpenModel, seed: number): Promise<OpenModel> {
  const { checkpoint, model } = open;
  const reason = refusal(open);
  const turns = reason === undefined ? turnsOf(open, seed) : reason;
  if (typeof turns === 'string') {
    throw badInput('This model cannot be rotated', {
      where: checkpoint.path,
      got: `model_type ${model.modelType}: ${turns}`,
      hint: 'Leave out --rotate: groups of 128 or fewer gain little by it.',
    });
  }
  const tensors = new Map<string, TensorEntry>();
  const add = (entry: TensorEntry) => {
    const own = turns.get(entry.name);
    tensors.set(entry.name, own ? { name: entry.name, shape: entry.shape, span: entry.span, encoding: { kind: 'rotated', of: entry, turns: own } } : entry); // prettier-ignore
  };
  const pieces = new Map<string, TensorEntry[]>();
  for (const { entry, sources } of open.tensors.values()) pieces.set(sources[0]!, [...(pieces.get(sources[0]!) ?? []), entry]); // prettier-ignore
  for (const [name, entry] of checkpoint.tensors) (pieces.get(name) ?? [entry]).forEach(add);
  const head = 'lm_head.weight';
  if (!tensors.has(head)) add({ ...open.tensors.get(model.embedding)!.entry, name: head });
  const config = { ...checkpoint.config, ...(model.tied && { tie_word_embeddings: false }) };
  const sizes = new Map([...turns.values()].flat().flatMap((turn) => (turn.side === 'norm' ? [] : [[turn.rotation.size, turn.rotation.order]]))); // prettier-ignore
  const matrices = [...sizes].map(([size, order]) => (size === order ? String(size) : `${size / order} blocks of ${order}`)); // prettier-ignore
  const notes = [
    ...checkpoint.notes,
    `Rotated by randomized Hadamard matrices of ${matrices.join(', ')}; norms went into the linears behind them.`,
    ...(model.tied ? ['Embedding and head were one tensor and are two now.'] : []),
  ];
  const turned = await modelOf({ ...checkpoint, tensors, config, notes });
  // One checkpoint under two models: what closes one closes both.
  return { ...turned, file: (path) => open.file(path), close: () => open.close() };
}

function refusal({ model, tensors, layout }: OpenModel): string | undefined {
  if (layout) return 'its weights are codes already; deepseek-convert convert --format safetensors makes plain ones';
  if (model.stateWidth !== model.hidden) return 'its layers pass on several hidden states side by side';
  const carried = [...tensors.keys()].find((name) => model.carried.some((prefix) => name.startsWith(prefix)));
  if (carried !== undefined) return `${carried} belongs to a part that shares the hidden states and is only carried along`; // prettier-ignore
  return undefined;
}

/** Each tensor's turns; a sentence where a tensor of a block is one that nothing is known of. */
function turnsOf({ model, tensors }: OpenModel, seed: number): Turns | string {
  const turns: Turns = new Map();
  const rotation = (size: number, stream: number): Rotation => ({ size, order: hadamardOrder(size), seed, stream });
  const add = (name: string, turn: Turn) => turns.set(name, [...(turns.get(name) ?? []), turn]);
  const reads = (linear: LinearSpec, by: Rotation, norm?: NormSpec) => {
    const gain = norm && tensors.get(`${norm.name}.weight`)!.entry;
    add(`${linear.name}.weight`, { side: 'inputs', rotation: by, ...(gain && { gain }) });
  };
  const writes = ({ name, outFeatures, bias }: LinearSpec, by: Rotation, width = outFeatures, from = 0) => {
    for (const part of bias ? ['weight', 'bias'] : ['weight']) add(`${name}.${part}`, { side: 'outputs', rotation: by, width, from }); // prettier-ignore
  };
  const hollow = ({ name }: NormSpec) => add(`${name}.weight`, { side: 'norm' });
  const stream = rotation(model.hidden, 0);
  const rotate = { turns, rotation, reads, writes, hollow, stream };

  add(model.embedding, { side: 'inputs', rotation: stream });
  reads({ ...model.head, name: 'lm_head' }, stream, model.norm);
  hollow(model.norm);
  for (const block of model.blocks) {
    const unknown = turnBlock(block, rotate);
    if (unknown !== undefined) return `nothing is known of how ${unknown} meets the hidden states`;
  }
  return turns;
}

interface Rotate {
  readonly turns: Turns;
  readonly stream: Rotation;
  readonly rotation: (size: number, stream: number) => Rotation;
  readonly reads: (linear: LinearSpec, by: Rotation, norm?: NormSpec) => void;
  readonly writes: (linear: LinearSpec, by: Rotation, width?: number, from?: number) => void;
  readonly hollow: (norm: NormSpec) => void;
}

/** The turns of one block; the name of a tensor that is not understood. */
function turnBlock(block: Block, { turns, stream, rotation, reads, writes, hollow }: Rotate): string | undefined {
  const { attention, norms, ffn, moe, index } = block;
  /** Tensors that stay: their inputs and outputs are not rotated. */
  const same = new Set<string>();
  const keep = (...linears: readonly LinearSpec[]) =>
    linears.forEach(({ name, bias }) => bias && same.add(`${name}.bias`));
  const { grouped, latent } = attention;
  if (grouped) {
    const { q, k, v, o, headDim, clip, qNorm, kNorm } = grouped;
    for (const linear of [q, k, v]) reads(linear, stream, norms.attention);
    // Clipping is no business of a rotated vector: there the values stay.
    if (clip === undefined) {
      const heads = rotation(headDim, 3 * index + 1);
      writes(v, heads, headDim);
      reads(o, heads);
    }
    writes(o, stream);
    keep(q, k, v);
    for (const norm of [qNorm, kNorm]) if (norm) same.add(`${norm.name}.weight`);
  }
  if (latent) {
    const { q, kvDown, kvNorm, kvUp, o, nope, value, rank, rope, indexer } = latent;
    const heads = rotation(value, 3 * index + 1);
    const latents = rotation(rank, 3 * index + 2);
    for (const linear of ['down' in q ? q.down : q, kvDown]) reads(linear, stream, norms.attention);
    writes(kvDown, latents, rank + rope.dim);
    reads(kvUp, latents, kvNorm);
    hollow(kvNorm);
    writes(kvUp, heads, nope + value, nope);
    reads(o, heads);
    writes(o, stream);
    if ('down' in q) {
      const queries = rotation(q.down.outFeatures, 3 * index + 3);
      writes(q.down, queries);
      for (const linear of [q.up, ...(indexer ? [indexer.q] : [])]) reads(linear, queries, q.norm);
      hollow(q.norm);
    }
    if (indexer) {
      for (const linear of [indexer.k, indexer.weights]) reads(linear, stream, norms.attention);
      for (const part of ['weight', 'bias']) same.add(`${indexer.norm}.${part}`);
    }
  }
  hollow(norms.attention);
  const network = ({ gate, up, down }: FfnSpec) => {
    for (const linear of [gate, up]) reads(linear, stream, norms.feedForward);
    writes(down, stream);
    keep(gate, up);
  };
  if (ffn) network(ffn);
  if (moe) {
    const { router, routeBias, byToken, experts, shared, sharedGate } = moe.layer;
    for (const linear of [router, ...(sharedGate ? [sharedGate] : [])]) reads(linear, stream, norms.feedForward);
    for (const one of [...experts, ...(shared ? [shared] : [])]) network(one);
    for (const name of [routeBias, byToken?.name]) if (name !== undefined) same.add(name);
    keep(router);
  }
  hollow(norms.feedForward);
  return block.tensors.find(({ name }) => !turns.has(name) && !same.has(name))?.name;
}
