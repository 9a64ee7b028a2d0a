import { createHash } from 'node:crypto';
import { readFile } from 'node:fs/promises';
import { scoreAll } from '../../arch/score.js';
import { TensorLoader } from '../../arch/load.js';
import { openModel, type OpenModel } from '../../arch/open.js';
import { vocabularyTensors, withVocabulary, type IdOf, type VocabularyTensor } from '../../arch/vocabulary.js';
import { stopIfAborted, type JobEnv } from '../../backend/env.js';
import type { FloatDType } from '../../base/dtype.js';
import { badInput } from '../../base/errors.js';
import { fileSource } from '../../base/io.js';
import { Job, type Json } from '../../base/job.js';
import { tool } from '../../base/version.js';
import { companionName } from '../../checkpoint/config.js';
import type { CheckpointWriter, PlannedTensor, StagedOutput, TensorEntry } from '../../checkpoint/types.js';
import { createWriter, isFileOutput } from '../../checkpoint/writer.js';
import { parseJson, isJsonObject } from '../../formats/json.js';
import { formatConfig } from '../../formats/config-json.js';
import { Scope } from '../../tensor/tensor.js';
import { loadTokenizer, type Tokenizer } from '../../tokenizer/tokenizer.js';
import { filesOf, rolesOf } from './files.js';
import { planRows, type Roles, type RowCounts, type RowPlan } from './rows.js';
import { remapped } from './tensor.js';

export interface RemapOptions {
  readonly input: string;
  readonly config?: string | undefined;
  /** The new tokenizer: a folder, or a tokenizer.json. */
  readonly tokenizer: string;
  readonly out: string;
  readonly overwrite: boolean;
  readonly restart: boolean;
  /** The new vocabulary is padded to a multiple of this. */
  readonly multiple: number;
  readonly shardSize: number;
  /** To tell the perplexity on, before and after. */
  readonly texts: readonly { readonly name: string; readonly text: string }[];
  /** Of each text. */
  readonly maxTokens: number;
  readonly recipe: Json;
  readonly resumeHint: string;
}

/** How well a model predicts the texts. Perplexities of two vocabularies differ by what a token is; bits do not. */
export type Prediction = {
  readonly tokens: number;
  readonly perplexity: number;
  readonly bitsPerByte: number;
};
export interface RemapReport {
  readonly vocabSize: { readonly before: number; readonly after: number };
  readonly rows: RowCounts;
  readonly tensors: readonly string[];
  readonly prediction: { readonly before: Prediction; readonly after: Prediction };
}

/** Bytes after which what is written is made durable. */
const flushEvery = 5e8;

/**
 * Writes a model with the vocabulary of another tokenizer: rows of embedding and head are taken over for tokens that
 * both know, and averaged from the pieces that spell a new one; every other tensor keeps its bytes. The output tells
 * its perplexity before it gets its name.
 * Errors: input (a tokenizer with more tokens than the embedding has rows, weights that are not plain tensors, a
 * perplexity that is no number), what `Job` and the writer refuse, interrupted.
 */
export async function remapModel(options: RemapOptions, env: JobEnv): Promise<RemapReport> {
  const open = await openModel(options.input, { config: options.config });
  try {
    const tokenizer = await loadTokenizer(options.tokenizer);
    const fingerprint = {
      tool: tool.version,
      command: 'tokenizer remap',
      input: open.checkpoint.fingerprint,
      tokenizer: tokenizer.hash,
      multiple: options.multiple,
      shardSize: options.shardSize,
      texts: createHash('sha256').update(JSON.stringify(options.texts)).digest('hex'),
      maxTokens: options.maxTokens,
    };
    const { out, overwrite, restart } = options;
    return await Job.run({ out, overwrite, restart, fingerprint }, (job) => remapInto(job, open, tokenizer, options, env)); // prettier-ignore
  } finally {
    await open.close();
  }
}

async function remapInto(job: Job, open: OpenModel, tokenizer: Tokenizer, options: RemapOptions, env: JobEnv): Promise<RemapReport> {
  const { checkpoint, model } = open;
  const old = await open.tokenizer();
  const vocabulary = vocabularyTensors(open);
  const roles = { before: oldRoles(open, old), after: rolesOf(tokenizer) };
  const plan = await planRows({ tokenizer: old, roles: roles.before }, { tokenizer, roles: roles.after }, options.multiple);
  requireRows(plan, open, old);
  const format = isFileOutput(options.out) && !options.out.endsWith('.safetensors') ? 'torch' : 'safetensors';
  const tensors = planTensors(open, vocabulary, plan, format === 'torch');
  const idOf: IdOf = (key, id, alone) => {
    const [same, role] = [plan.newIds.get(id), roles.after[key.replace(/_token_ids?$/, '')]];
    // What ends a text may be several tokens; the tokenizer names one.
    return alone ? (role ?? same) : (same ?? role);
  };
  const sizes = { from: model.vocab, to: plan.size };
  const generation = checkpoint.companions.find((path) => companionName(path) === 'generation_config.json');
  const made = { vocabSize: { before: model.vocab, after: plan.size }, rows: plan.counts, tensors: vocabulary.map(({ name }) => name) };
  const finished = async (): Promise<RemapReport> => {
    const prediction = { before: job.data('before') as Prediction, after: job.data('after') as Prediction };
    await job.remove();
    return { ...made, prediction };
  };
  if (job.finished) return await finished();
  const before = (job.data('before') as Prediction | undefined) ?? (await predict(open, old, options, env));
  await job.mark('before', before);
  const accept = async ({ path }: StagedOutput): Promise<Json> => {
    const staged = await openModel(path);
    try {
      const after = await predict(staged, await staged.tokenizer(), options, env);
      await job.mark('after', after);
      return { skipped: 'another vocabulary', before, after };
    } finally {
      await staged.close();
    }
  };
  const files = await filesOf(checkpoint.companions, options.tokenizer, tokenizer);
  if (generation !== undefined) files.extraFiles.set('generation_config.json', await generationConfig(generation, sizes, idOf));
  const writer = await createWriter({
    job,
    format,
    tensors: tensors.map(({ planned }) => planned),
    shardSize: options.shardSize,
    config: withVocabulary(checkpoint.config, sizes, idOf),
    companions: files.companions,
    extraFiles: files.extraFiles,
    provenance: { tool, recipe: options.recipe, inputs: [...checkpoint.files, tokenizer.path] },
    accept,
  });
  try {
    await writeTensors(tensors, plan, open, writer, env, options.resumeHint);
    await checkpoint.assertUnchanged();
    await writer.finish({ remap: made });
    return await finished();
  } finally {
    await writer.close();
  }
} // prettier-ignore

function oldRoles({ model, checkpoint }: OpenModel, old: Tokenizer): Roles {
  const pad = checkpoint.config.pad_token_id;
  const eos = model.eosIds[0];
  return {
    ...(model.bosId !== undefined && { bos: model.bosId }),
    ...(eos !== undefined && { eos }),
    ...(typeof pad === 'number' && pad >= 0 && { pad }),
    ...rolesOf(old),
  };
}

function requireRows({ known }: RowPlan, { model, checkpoint }: OpenModel, old: Tokenizer): void {
  if (known <= model.vocab) return;
  throw badInput("The model's tokenizer has more tokens than its embedding has rows", {
    where: old.path,
    got: `${known} tokens`,
    expected: `at most ${model.vocab}, as ${checkpoint.path} has`,
    hint: 'The tokenizer belongs to another model.',
  });
}

/** One tensor of the output: as it lies in the input, or with other rows. */
interface RemapTensor {
  readonly planned: PlannedTensor;
  readonly entry: TensorEntry;
  readonly rows: boolean;
}

function planTensors(open: OpenModel, vocabulary: readonly VocabularyTensor[], plan: RowPlan, torch: boolean): RemapTensor[] {
  const byName = new Map(vocabulary.map((tensor) => [tensor.name, tensor]));
  const tensors = [...open.checkpoint.tensors.values()].flatMap((entry): RemapTensor[] => {
    const { name, shape, encoding, strides } = entry;
    const { tiedTo } = byName.get(name) ?? {};
    if (byName.has(name)) {
      // Readers of safetensors take the embedding where the head is tied.
      if (tiedTo !== undefined && !torch) return [];
      const own = encoding.kind === 'plain' ? encoding.dtype : undefined;
      const dtype: FloatDType = own === 'f32' || own === 'f16' ? own : 'bf16';
      const planned = { name, shape: [plan.size, ...shape.slice(1)], dtype, ...(tiedTo !== undefined && { tiedTo }) };
      return [{ planned, entry, rows: true }];
    }
    if (strides || (encoding.kind !== 'plain' && encoding.kind !== 'opaque')) {
      throw badInput('A tensor is stored in a way that cannot be carried along', {
        where: `${entry.span.path}, tensor ${name}`,
        got: strides ? 'a view of another tensor' : encoding.kind,
        hint: 'Bring the checkpoint to plain tensors first: deepseek-convert convert <model> -o plain --dtype bf16.',
      });
    }
    const planned = encoding.kind === 'plain' ? { name, shape, dtype: encoding.dtype } : { name, shape, dtype: 'u8' as const, encoding };
    return [{ planned, entry, rows: false }];
  });
  // What another one holds the data of comes behind it.
  return [...tensors.filter(({ planned }) => !planned.tiedTo), ...tensors.filter(({ planned }) => planned.tiedTo)];
} // prettier-ignore

async function writeTensors(tensors: readonly RemapTensor[], plan: RowPlan, open: OpenModel, writer: CheckpointWriter, env: JobEnv, resumeHint: string): Promise<void> {
  const loader = new TensorLoader(open, env.device);
  const own = tensors.filter(({ planned }) => planned.tiedTo === undefined);
  let unflushed = 0;
  for (const [i, { planned, entry, rows }] of own.entries()) {
    if (env.signal.aborted) await writer.flush();
    stopIfAborted(env, resumeHint);
    if (!writer.has(planned.name)) {
      if (rows) await writeRows(planned, entry, plan, loader, writer, env);
      else await writer.write(planned.name, fileSource(entry.span));
      unflushed += entry.span.bytes;
    }
    if (unflushed >= flushEvery) {
      await writer.flush();
      unflushed = 0;
    }
    env.log.progress({ stage: 'remap', done: i + 1, total: own.length });
  }
} // prettier-ignore

async function writeRows(planned: PlannedTensor, entry: TensorEntry, plan: RowPlan, loader: TensorLoader, writer: CheckpointWriter, env: JobEnv): Promise<void> {
  using scope = new Scope(env.device);
  const old = scope.empty(planned.dtype, entry.shape);
  await loader.load([{ name: planned.name, into: old }]);
  // A bias is one column.
  const made = remapped(scope, old.view(old.dim(0), -1), plan);
  await writer.write(planned.name, made.source());
} // prettier-ignore

async function generationConfig(path: string, sizes: { from: number; to: number }, idOf: IdOf): Promise<string> {
  const config = parseJson(await readFile(path), { where: path, lenient: true });
  if (!isJsonObject(config)) throw badInput('generation_config.json is no JSON object', { where: path });
  return formatConfig(withVocabulary(config, sizes, idOf));
} // prettier-ignore

/** Errors: input, probabilities that are no numbers. */
async function predict(open: OpenModel, tokenizer: Tokenizer, { texts, maxTokens }: RemapOptions, env: JobEnv): Promise<Prediction> {
  let [nats, scored, bytes, tokens] = [0, 0, 0, 0];
  const inputs = await Promise.all(
    texts.map(async ({ text }) => (await tokenizer.encode(text, { special: true })).subarray(0, maxTokens)),
  );
  for (const [i, { logprobs, scored: own, meanLogprob }] of (await scoreAll(open, env, inputs)).entries()) {
    const ids = inputs[i]!;
    const judged = ids.filter((_, t) => !Number.isNaN(logprobs[t]!));
    nats -= meanLogprob * own;
    bytes += Buffer.byteLength(await tokenizer.decode(judged));
    [scored, tokens] = [scored + own, tokens + ids.length];
  }
  return { tokens, perplexity: Math.exp(nats / scored), bitsPerByte: nats / Math.LN2 / bytes };
} // prettier-ignore
