import { createHash } from 'node:crypto';
import { rm } from 'node:fs/promises';
import { basename, extname, join } from 'node:path';
import type { ByteSource } from '../base/bytes.js';
import { openDigests, type Digests } from '../base/digest.js';
import { badInput, bug } from '../base/errors.js';
import { fsyncPath, ioError, makeFolder, readJsonFile, requireSpace, writeFileAtomic } from '../base/files.js';
import type { Json } from '../base/job.js';
import { planLayout } from './layout.js';
import type { OutputLayout } from './layout.js';
import { OutputFile } from './output-file.js';
import { deliver, planSidecars } from './sidecars.js';
import type { Sidecar } from './sidecars.js';
import { planKey } from './types.js';
import type { CheckpointWriter } from './types.js';
import { verifyOutput } from './verify.js';
import type { WriterOptions } from './writer-options.js';

export type { Provenance, WriterOptions } from './writer-options.js';

/** Whether an output path names one file (`X.bin`) rather than a folder. */
export const isFileOutput = (out: string): boolean =>
  ['.bin', '.pt', '.pth', '.safetensors', '.gguf'].includes(extname(out));

/**
 * Starts an output, or goes on with the one that an earlier run of the same job left.
 * Errors: kind 'input' when a file would be overwritten that belongs to another model; 'resource' when the disk is too
 * small. Nothing has its final name before `finish`.
 */
export async function createWriter(options: WriterOptions): Promise<CheckpointWriter> {
  const { job, format, tensors } = options;
  const fileName = options.part === undefined && isFileOutput(job.out) ? basename(job.out) : undefined;
  const layout = planLayout({
    format,
    tensors,
    fileName,
    shardSize: options.shardSize ?? 5e9,
    metadata: options.metadata ?? { format: 'pt' },
    inPlanOrder: options.inPlanOrder,
    gguf: options.gguf,
    onnx: options.onnx,
  });
  const sidecars = await planSidecars(options, fileName, layout);
  const digest = openDigests(layout.files.some(({ afterExtent }) => afterExtent !== undefined));
  try {
    const extra = sidecars.reduce((sum, { bytes }) => sum + bytes.length, 2 ** 20);
    const files = await openFiles(options, layout, digest, extra);
    return new Writer(options, layout, sidecars, files, digest);
  } catch (error) {
    await digest.close();
    throw error;
  }
}

/** Digest of everything that decides where each byte goes. */
function planHash(layout: OutputLayout): string {
  const hash = createHash('sha256');
  for (const { name, size, extents, pieces } of layout.files) {
    hash.update(JSON.stringify([name, size, extents]));
    for (const { bytes } of pieces) hash.update(bytes);
  }
  return hash.digest('hex');
}

/** What an interrupted run leaves: which plan, and which tensors are on disk (a byte for each). */
async function savePlan(options: Place, hash: string, done: Buffer): Promise<void> {
  await writeFileAtomic(planPath(options), `${JSON.stringify({ hash, done: done.toString('base64') })}\n`);
}

type Place = Pick<WriterOptions, 'job' | 'part'>;
const planPath = ({ job, part }: Place): string =>
  join(job.folder, part === undefined ? 'plan.json' : `plan-${part}.json`);
const folderOf = ({ job, part }: Place): string =>
  part === undefined ? job.outputFolder : join(job.outputFolder, part);

async function openFiles(
  options: Place,
  layout: OutputLayout,
  digest: Digests,
  extraBytes: number,
): Promise<OutputFile[]> {
  const { job } = options;
  const folder = folderOf(options);
  const hash = planHash(layout);
  const before = (await readJsonFile(planPath(options))) as { hash: string; done: string } | undefined;
  if (before !== undefined && before.hash !== hash) {
    throw badInput('The work folder holds another output than this one', {
      where: planPath(options),
      hint: 'Begin anew with --restart.',
    });
  }
  if (before === undefined) {
    const size = layout.files.reduce((sum, file) => sum + file.size, extraBytes);
    await requireSpace(job.folder, size);
    // Without a plan on disk the files may be half made.
    await rm(folder, { recursive: true, force: true });
    await makeFolder(folder).catch((error: unknown) => {
      throw ioError(error, 'make the output folder', folder);
    });
    const files: OutputFile[] = [];
    for (const file of layout.files) files.push(await OutputFile.create(folder, file, digest));
    for (const file of files) await file.sync();
    await fsyncPath(folder);
    if (folder !== job.outputFolder) await fsyncPath(job.outputFolder);
    const none = Buffer.alloc(layout.files.reduce((sum, file) => sum + file.extents.length, 0));
    await savePlan(options, hash, none);
    return files;
  }
  const done = Buffer.from(before.done, 'base64');
  const files: OutputFile[] = [];
  let at = 0;
  for (const file of layout.files) {
    files.push(await OutputFile.reopen(folder, file, digest, done.subarray(at, at + file.extents.length)));
    at += file.extents.length;
  }
  let left = extraBytes;
  for (const file of files) left += file.layout.size - (await file.allocated());
  await requireSpace(job.folder, left);
  return files;
}

class Writer implements CheckpointWriter {
  readonly partFolder: string;
  readonly #places = new Map<string, { file: OutputFile; index: number; tied: boolean }>();
  readonly #hash: string;
  readonly #folder: string;
  #closed = false;
  readonly #inputs = openDigests();
  readonly #inputHashes: readonly Promise<string>[];
  #flushing: Promise<void> = Promise.resolve();

  constructor(
    readonly options: WriterOptions,
    readonly layout: OutputLayout,
    readonly sidecars: readonly Sidecar[],
    readonly files: readonly OutputFile[],
    readonly digest: Digests,
  ) {
    this.partFolder = options.job.folder;
    this.#hash = planHash(layout);
    this.#folder = folderOf(options);
    const tied = new Set(options.tensors.filter((tensor) => tensor.tiedTo !== undefined).map(({ name }) => name));
    for (const file of files) {
      file.layout.extents.forEach(({ names }, index) => {
        for (const name of names) this.#places.set(name, { file, index, tied: tied.has(name) });
      });
      file.follow();
    }
    this.#inputHashes = options.provenance.inputs.map((path) => this.#inputs.finish(path));
    // A failure is reported by finish(); until then it must not end the process as an unhandled rejection.
    for (const promise of this.#inputHashes) promise.catch(() => undefined);
  }

  has(name: string): boolean {
    const { file, index } = this.#place(name);
    return file.done[index] === 1;
  }

  fileOf(name: string): string {
    return this.#place(name).file.path;
  }

  async write(name: string, data: ByteSource): Promise<void> {
    const { file, index, tied } = this.#place(name);
    if (tied) throw bug('A tied tensor is written; its partner alone holds data', { where: `tensor ${name}` });
    await file.write(index, data);
  }

  /** One after another: an older list of what is complete must not replace a newer one. */
  flush(): Promise<void> {
    const flushed = this.#flushing.then(() => this.#flush());
    this.#flushing = flushed.catch(() => undefined);
    return flushed;
  }

  async #flush(): Promise<void> {
    // What completes while the disks flush is recorded by the next flush.
    const done = Buffer.concat(this.files.map((file) => file.done));
    for (const file of this.files) await file.sync();
    await fsyncPath(this.#folder);
    await savePlan(this.options, this.#hash, done);
  }

  async finish(report: Readonly<Record<string, Json>> = {}): Promise<void> {
    const { job, part, tensors, accept } = this.options;
    const missing = tensors.map(planKey).filter((name) => !this.has(name));
    if (missing.length > 0) {
      throw bug(`${missing.length} planned tensors were never written`, { got: missing.slice(0, 5).join(', ') });
    }
    await this.flush();
    const outputs: Json[] = [];
    const sums = await Promise.all(this.files.map((file) => file.finish()));
    for (const [i, { layout }] of this.files.entries()) {
      outputs.push({ name: layout.name, bytes: layout.size, sha256: sums[i]! });
    }
    const sidecars = this.sidecars.filter(({ role }) => role !== 'provenance');
    for (const { partName, name, bytes } of sidecars) {
      await writeFileAtomic(join(this.#folder, partName), bytes);
      outputs.push({ name, bytes: bytes.length, sha256: createHash('sha256').update(bytes).digest('hex') });
    }
    const provenance = await this.#provenance(outputs, report);
    await this.#writeProvenance(provenance);
    await this.close();
    await verifyOutput(this.#folder, this.layout, tensors);
    let validation: Json | undefined;
    if (accept) {
      const file = part === undefined && isFileOutput(job.out) ? this.layout.files[0]!.name : '';
      validation = await accept({ path: join(this.#folder, file), workFolder: job.folder });
    }
    const card = await this.#writeCard(validation);
    const all = outputs.map((output) => (card && (output as { name: string }).name === card.name ? card : output));
    await this.#writeProvenance({ ...provenance, outputs: all, ...(validation !== undefined && { validation }) });
    if (part !== undefined) return;
    await job.markFinishing();
    await deliver(job, this.layout, this.sidecars);
  }

  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    for (const file of this.files) await file.close();
    await Promise.all([this.digest.close(), this.#inputs.close()]);
  }

  async #provenance(outputs: Json[], report: Readonly<Record<string, Json>>): Promise<Record<string, Json>> {
    const { tool, recipe, inputs } = this.options.provenance;
    const hashed: Json[] = [];
    for (const [i, path] of inputs.entries())
      hashed.push({ name: basename(path), sha256: await this.#inputHashes[i]! });
    return { schema: 1, tool, recipe, inputs: hashed, outputs, ...report };
  }

  async #writeProvenance(provenance: Json): Promise<void> {
    const { partName } = this.sidecars.find(({ role }) => role === 'provenance')!;
    await writeFileAtomic(join(this.#folder, partName), `${JSON.stringify(provenance, null, 2)}\n`);
  }

  /** README.md with what was measured; undefined where the output has none. */
  async #writeCard(validation: Json | undefined): Promise<{ name: string; bytes: number; sha256: string } | undefined> {
    const { card } = this.options;
    const sidecar = this.sidecars.find(({ name }) => /(^|\.)README\.md$/.test(name));
    if (!card || !sidecar) return undefined;
    const bytes = Buffer.from(card(validation));
    await writeFileAtomic(join(this.#folder, sidecar.partName), bytes);
    const sha256 = createHash('sha256').update(bytes).digest('hex');
    return { name: sidecar.name, bytes: bytes.length, sha256 };
  }

  #place(name: string): { file: OutputFile; index: number; tied: boolean } {
    const place = this.#places.get(name);
    if (place !== undefined) return place;
    throw bug('A tensor that was not planned', { where: `tensor ${JSON.stringify(name)}` });
  }
}
