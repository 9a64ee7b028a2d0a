import { stat } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { loadNative } from '../backend/native.js';
import { DigestWorker } from '../base/digest.js';
import { badInput, badUsage, bug } from '../base/errors.js';
import { ioError, makeFolder, writeFileAtomic } from '../base/files.js';
import { Job, type Json } from '../base/job.js';
import type { Log } from '../base/log.js';
import { tool } from '../base/version.js';
import { deliverParts } from '../checkpoint/sidecars.js';
import { trainBpe, type BpeOptions } from '../tokenizer/bpe-train.js';
import { makeTokenizer } from '../tokenizer/tokenizer.js';
import { tokenizerFiles, type SpecialTokens } from '../tokenizer/tokenizer-files.js';
import { textLines } from '../tokenizer/train-text.js';

export interface TrainTokenizerOptions extends Omit<BpeOptions, 'special'> {
  readonly texts: readonly string[];
  readonly out: string;
  readonly overwrite: boolean;
  readonly special: SpecialTokens;
  readonly addBos: boolean;
  /** For whoever trains a model with it; stands in deepseek-convert.json, never in tokenizer.json. */
  readonly bpeDropout: number;
  readonly recipe: Json;
}

export interface TrainTokenizerReport {
  readonly vocabSize: number;
  readonly merges: number;
  /** UTF-8 text that was learned from. */
  readonly bytes: number;
  /** Of a piece of that text, encoded by the finished tokenizer. */
  readonly bytesPerToken: number;
}

/** Text of the end check. */
const checkBytes = 2 ** 18;

/**
 * Learns a tokenizer from text files and writes its folder: tokenizer.json, tokenizer_config.json,
 * special_tokens_map.json, and in deepseek-convert.json how it was made. Before the folder gets its name the library
 * that encodes loads it, and gives back the text that it encodes.
 * Errors: as `trainBpe` and `textLines`; an output that exists.
 */
export async function trainTokenizer(
  options: TrainTokenizerOptions,
  env: { readonly log: Log; readonly signal: AbortSignal },
): Promise<TrainTokenizerReport> {
  const { texts, out, overwrite, special, preTokenizer, digits, addBos, vocabSize, minFrequency, bpeDropout } = options;
  if (texts.length === 0) throw badUsage('No text to learn from', { expected: 'one or more files: .txt, .jsonl' });
  const total = await sizeOf(texts);
  const fingerprint = { tool: tool.version, command: 'tokenizer train', texts: [...texts], recipe: options.recipe };
  return await Job.run({ out, overwrite, restart: true, fingerprint }, async (job) => {
    const digests = new DigestWorker();
    try {
      const hashes = Promise.all(texts.map((path) => digests.finish(path)));
      hashes.catch(() => undefined); // reported when it is waited for
      let [sample, bytes] = ['', 0];
      async function* read() {
        for await (const lines of textLines(texts)) {
          if (sample === '') sample = Buffer.from(lines.bytes.subarray(0, checkBytes)).toString().replace(/\ufffd+$/, '');
          yield lines;
          bytes += lines.bytes.length;
          env.log.progress({ stage: 'count', done: Math.min(bytes, total), total });
        }
      } // prettier-ignore
      const settings = { vocabSize, minFrequency, preTokenizer, digits, special: special.all };
      const bpe = await trainBpe(loadNative().BpeTrainer, read(), settings, env);
      const files = tokenizerFiles(bpe, { preTokenizer, digits, special, addBos });
      const bytesPerToken = await check(files.get('tokenizer.json')!, bpe.tokens.length, sample);
      await makeFolder(job.outputFolder);
      for (const [name, content] of files) await writeFileAtomic(join(job.outputFolder, name), content);
      const report = { vocabSize: bpe.tokens.length, merges: bpe.merges.length, bytes, bytesPerToken };
      const inputs = (await hashes).map((sha256, i) => ({ name: basename(texts[i]!), sha256 }));
      const training = { preTokenizer, digits: digits ?? null, minFrequency, bpeDropout };
      await deliverParts(job, { schema: 1, tool, recipe: options.recipe, inputs, training, ...report });
      await job.remove();
      return report;
    } finally {
      await digests.close();
    }
  });
}

async function sizeOf(paths: readonly string[]): Promise<number> {
  let size = 0;
  for (const path of paths) {
    const facts = await stat(path).catch((error: unknown) => {
      throw ioError(error, 'read the text', path);
    });
    if (!facts.isFile()) throw badInput('A text is no file', { where: path });
    size += facts.size;
  }
  return size;
}

/** Bytes a token of `sample`. */
async function check(json: string, vocabSize: number, sample: string): Promise<number> {
  const tokenizer = await makeTokenizer(json, 'the trained tokenizer');
  const ids = await tokenizer.encode(sample);
  const back = await tokenizer.decode(ids, { special: true });
  if (tokenizer.vocabSize !== vocabSize || back !== sample) {
    throw bug('The trained tokenizer does not give back its text', { got: `${tokenizer.vocabSize} tokens`, expected: `${vocabSize} tokens` }); // prettier-ignore
  }
  return Buffer.byteLength(sample) / Math.max(1, ids.length);
}
