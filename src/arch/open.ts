import type { FileHandle } from 'node:fs/promises';
import { badInput } from '../base/errors.js';
import { readJsonFile } from '../base/files.js';
import { companionName } from '../checkpoint/config.js';
import { openCheckpoint } from '../checkpoint/open.js';
import type { Checkpoint } from '../checkpoint/types.js';
import { detectLayout } from '../layout/detect.js';
import type { LayoutReader } from '../layout/types.js';
import { loadTokenizer, makeTokenizer, type Tokenizer } from '../tokenizer/tokenizer.js';
import { coverage, sameBytes, type Coverage } from './coverage.js';
import { OpenFiles } from './files.js';
import { buildModel } from './registry.js';
import { storedWeights, type StoredWeight } from './stored.js';
import type { Model, TensorSpec } from './types.js';

/** A checkpoint whose architecture is understood: every tensor it needs is there, and every tensor there is known. */
export interface OpenModel {
  readonly checkpoint: Checkpoint;
  readonly model: Model;
  /** The quantized layout that it is stored in. */
  readonly layout: LayoutReader | undefined;
  /** What is stored, by the names that the architecture uses. */
  readonly tensors: ReadonlyMap<string, StoredWeight>;
  readonly coverage: Coverage;
  /** What was assumed or left out, one sentence each. */
  readonly notes: readonly string[];
  /** What the architecture expects of a tensor. */
  spec(name: string): TensorSpec | undefined;
  /** A file of the checkpoint, opened for reading and kept open. */
  file(path: string): Promise<FileHandle>;
  /** Errors: the model has none. */
  tokenizer(): Promise<Tokenizer>;
  close(): Promise<void>;
}

export interface OpenModelOptions {
  /** Path of the config, where it does not lie beside the weights. */
  config?: string | undefined;
  /** The checkpoint as if it had been stored otherwise. */
  reshape?: ((checkpoint: Checkpoint) => Checkpoint) | undefined;
}

/**
 * Opens a checkpoint and its architecture; reads headers only.
 * Errors: what `openCheckpoint` refuses, unknown architecture or settings, tensors missing, of wrong shape, unknown.
 */
export async function openModel(path: string, { config, reshape }: OpenModelOptions = {}): Promise<OpenModel> {
  const stored = await openCheckpoint(path, { config });
  return await modelOf(reshape ? reshape(stored) : stored);
}

/** The model that an open checkpoint holds. Errors: as `openModel`. */
export async function modelOf(checkpoint: Checkpoint): Promise<OpenModel> {
  const where = checkpoint.configPath ?? checkpoint.path;
  const layout = detectLayout(checkpoint.config, where);
  const tensors = storedWeights(checkpoint.tensors, layout);
  const built = await modelAsStored(checkpoint.config, where, tensors);
  const companion = (name: string) => checkpoint.companions.find((file) => companionName(file) === name);
  const model = { ...built, config: checkpoint.config, ...(await generationIds(companion('generation_config.json'))) };
  const specs = new Map([...model.outer, ...model.blocks.flatMap((b) => b.tensors)].map((s) => [s.name, s]));
  const covered = coverage(model, specs, tensors, checkpoint);
  const files = new OpenFiles();
  let tokenizer: Promise<Tokenizer> | undefined;
  return {
    checkpoint,
    model,
    layout,
    tensors,
    coverage: covered,
    notes: [...checkpoint.notes, ...(layout?.notes ?? [])],
    spec: (name) => specs.get(name),
    file: (file) => files.get(file),
    tokenizer: () => (tokenizer ??= loadTokenizerOf(checkpoint, companion('tokenizer.json'))),
    close: async () => {
      await files.close();
      await checkpoint.close();
    },
  };
}

async function loadTokenizerOf(checkpoint: Checkpoint, file: string | undefined): Promise<Tokenizer> {
  if (file !== undefined) return loadTokenizer(file);
  const inside = checkpoint.extraFiles.get('tokenizer.json');
  if (inside !== undefined) return makeTokenizer(inside, checkpoint.path);
  const old = checkpoint.companions.map(companionName).find((name) => /\.model$|^vocab\./.test(name));
  throw badInput('The model has no tokenizer.json', {
    where: checkpoint.path,
    hint: old
      ? `${old} is an older form: load it with AutoTokenizer in Python once and save_pretrained() beside the weights.`
      : 'Put the tokenizer.json of the model beside its weights.',
  });
}

/**
 * By transformers' rule, embedding and head are not tied where both are stored and differ, whatever the config says.
 */
export async function modelAsStored(
  config: Readonly<Record<string, unknown>>,
  where: string,
  tensors: ReadonlyMap<string, StoredWeight>,
): Promise<Model> {
  const stores = (name: string) => tensors.has(name);
  const model = buildModel(config, where, stores);
  const [a, b] = [tensors.get(model.embedding), tensors.get('lm_head.weight')];
  if (!model.tied || !a || !b || (a.linear === b.linear && (await sameBytes(a.entry, b.entry)))) return model;
  return buildModel({ ...config, tie_word_embeddings: false }, where, stores);
}

/** Token ids that end a text, where generation_config.json knows better than config.json. */
async function generationIds(path: string | undefined): Promise<{ eosIds?: number[] }> {
  if (path === undefined) return {};
  const { eos_token_id: eos } = ((await readJsonFile(path)) ?? {}) as { eos_token_id?: unknown };
  const ids = (Array.isArray(eos) ? eos : [eos]).filter((id): id is number => Number.isSafeInteger(id));
  return ids.length > 0 ? { eosIds: ids } : {};
}
