import { readFile, rename, rm } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { badInput } from '../base/errors.js';
import { errorCode, exists, fsyncPath, ioError, renameDurable, writeFileAtomic } from '../base/files.js';
import type { Job, Json } from '../base/job.js';
import { formatConfig } from '../formats/config-json.js';
import { companionName, stemOf } from './config.js';
import type { OutputLayout } from './layout.js';
import type { WriterOptions } from './writer-options.js';

/** A small file beside the weights. */
export interface Sidecar {
  readonly role: 'config' | 'index' | 'companion' | 'provenance';
  /** Its name in the output. */
  readonly name: string;
  /** Its name while the output grows: files beside a lone `X.bin` are read back from there. */
  readonly partName: string;
  readonly bytes: Buffer;
}

/**
 * Decides which small files the output gets, and under which names. Beside a lone `X.bin` the config is
 * `X.config.json`; a companion that would replace another model's file gets the prefix `X.`.
 */
export async function planSidecars(
  options: WriterOptions,
  fileName: string | undefined,
  layout: OutputLayout,
): Promise<Sidecar[]> {
  const prefix = fileName === undefined ? '' : `${stemOf(fileName)}.`;
  const own = (role: Sidecar['role'], name: string, text: string | Uint8Array): Sidecar => ({
    role,
    name: prefix + name,
    partName: prefix + name,
    bytes: Buffer.from(text as string),
  });
  const provenance = own('provenance', 'deepseek-convert.json', '');
  if (options.format === 'gguf') {
    // Config and tokenizer are inside; what says more than they do lies beside them, and the card beside a lone file.
    const beside = [...(options.extraFiles ?? [])].filter(([name]) =>
      fileName === undefined ? !name.startsWith('tokenizer') : name === 'README.md',
    );
    return [...beside.map(([name, content]) => own('companion', name, content)), provenance];
  }
  const sidecars = [own('config', 'config.json', formatConfig(options.config))];
  if (layout.index !== undefined) {
    sidecars.push(own('index', layout.index.name, `${JSON.stringify(layout.index.json, null, 2)}\n`));
  }
  const extra = new Map<string, string | Uint8Array>();
  for (const path of options.companions ?? []) {
    extra.set(companionName(path), await readFile(path).catch((error: unknown) => {
      throw ioError(error, 'read', path);
    })); // prettier-ignore
  }
  for (const [name, content] of options.extraFiles ?? []) extra.set(name, content);
  const folder = dirname(options.job.out);
  for (const [name, content] of extra) {
    const bytes = Buffer.from(content as string);
    const clash = fileName !== undefined && (await differs(join(folder, name), bytes));
    const final = clash || (prefix !== '' && !name.includes('.')) ? prefix + name : name;
    sidecars.push({ role: 'companion', name: final, partName: final, bytes });
  }
  sidecars.push(provenance);
  if (fileName !== undefined && !options.job.overwrite) await refuseClashes(folder, sidecars);
  return sidecars;
}

async function refuseClashes(folder: string, sidecars: readonly Sidecar[]): Promise<void> {
  for (const { name, bytes, role } of sidecars) {
    const path = join(folder, name);
    if (role === 'provenance' || !(await differs(path, bytes))) continue;
    throw badInput('A file beside the output exists already and is another one', {
      where: path,
      hint: 'Add --overwrite to replace it, or choose another path with -o.',
    });
  }
}

async function differs(path: string, bytes: Buffer): Promise<boolean> {
  try {
    return !(await readFile(path)).equals(bytes);
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return false;
    throw ioError(error, 'read', path);
  }
}

/** Gives the finished output its name: a folder by one rename, a lone file after the files beside it. */
export async function deliver(job: Job, layout: OutputLayout, sidecars: readonly Sidecar[]): Promise<void> {
  const { out, outputFolder } = job;
  await fsyncPath(outputFolder);
  if (layout.files[0]!.name !== lastPart(out)) {
    if (await exists(out)) await moveAside(job);
    await renameDurable(outputFolder, out);
    return;
  }
  const folder = dirname(out);
  for (const { partName, name } of sidecars) {
    await rename(join(outputFolder, partName), join(folder, name)).catch((error: unknown) => {
      throw ioError(error, 'put into place', join(folder, name));
    });
  }
  await fsyncPath(folder);
  await renameDurable(join(outputFolder, layout.files[0]!.name), out);
  await rm(outputFolder, { recursive: true });
}

/** Gives several outputs their common name by one rename; `summary` says in the folder's own file what they are. */
export async function deliverParts(job: Job, summary: Json): Promise<void> {
  const { out, outputFolder } = job;
  await writeFileAtomic(join(outputFolder, 'deepseek-convert.json'), `${JSON.stringify(summary, null, 2)}\n`);
  await job.markFinishing();
  await fsyncPath(outputFolder);
  if (await exists(out)) await moveAside(job);
  await renameDurable(outputFolder, out);
}

const lastPart = (path: string): string => path.slice(dirname(path).length).replace(/^\//, '');

/** An output to be replaced (or an empty folder) waits in the work folder until the new one has its name. */
async function moveAside({ out, folder }: Job): Promise<void> {
  const aside = join(folder, 'replaced');
  await rm(aside, { recursive: true, force: true });
  await renameDurable(out, aside);
}
