import { createHash } from 'node:crypto';
import { stat } from 'node:fs/promises';
import { basename } from 'node:path';
import { badInput } from '../base/errors.js';
import { ioError } from '../base/files.js';
import { closeFiles } from '../base/io.js';
import type { TensorEntry } from '../formats/types.js';
import { byName } from './by-name.js';
import { companionName, findCompanions, findConfig, missingConfig } from './config.js';
import { isNativeShard, locate, refuseLinksOut } from './locate.js';
import { checkIndex, parseFiles } from './parse.js';
import type { OpenedFile } from './parse.js';
import { joinScales } from './scales.js';
import type { Checkpoint, ContainerFormat } from './types.js';

export interface OpenOptions {
  /** Path of the config, where it does not lie beside the weights. */
  readonly config?: string | undefined;
  /** Opens checkpoints without a config too (`inspect`); their `config` is empty. */
  readonly configOptional?: boolean;
  /** Leaves block-scaled weights and their scales the separate tensors that they are in the files. */
  readonly keepScales?: boolean;
}

/**
 * Opens a checkpoint for reading: a file, an index, or a folder. Reads headers only; formats are told by content.
 * Errors (kind 'input') name file, byte or tensor: missing files, damaged or hostile headers, no config.
 */
export async function openCheckpoint(path: string, options: OpenOptions = {}): Promise<Checkpoint> {
  const located = await locate(path);
  const files = await parseFiles(located.files, path);
  const isGguf = files[0]!.format === 'gguf';
  const isNative = isNativeShard(located.files[0]!);
  const { found, tried } = await findConfig(located.folder, located.file, options.config, isGguf);
  if (found === undefined && !isGguf && !options.configOptional) throw missingConfig(path, tried);
  let config: Readonly<Record<string, unknown>> = found?.config ?? {};
  let companions = await findCompanions(located.folder, located.file);
  await refuseLinksOut(located.folder, companions);
  let extraFiles = new Map<string, string>();
  const notes = [...located.notes, ...new Set(files.flatMap((file) => file.notes))];
  let tensors: Map<string, TensorEntry>;
  let widened: Checkpoint['widened'] = new Map();
  if (isNative) {
    const { fromNative } = await import('./deepseek-native.js');
    tensors = fromNative(files.map((file) => file.tensors), config); // prettier-ignore
  } else {
    const entries: TensorEntry[] = [];
    for (const file of files) for (const entry of file.tensors) entries.push(entry); // flatMap takes ten times as long
    if (entries.length === 0) throw badInput('The checkpoint holds no tensors', { where: files[0]?.path ?? '' });
    if (located.index) checkIndex(files, located.index);
    if (isGguf) {
      const { fromGguf } = await import('./gguf-model.js');
      const model = await fromGguf(files[0]!.gguf!, byName(entries), path, found?.config);
      ({ config, tensors, extraFiles, widened } = model);
      notes.push(...model.notes);
      // The file's own tokenizer, not one that happens to lie in the same folder.
      companions = companions.filter((file) => !extraFiles.has(companionName(file)));
    } else if (files[0]!.onnx !== undefined) {
      const { fromOnnx } = await import('./onnx-model.js');
      ({ config, tensors } = fromOnnx(byName(entries), files[0]!.onnx.nodes, config));
    } else {
      tensors = options.keepScales ? byName(entries) : joinScales(entries, config);
    }
  }
  const external = files.flatMap((file) => file.onnx?.externalFiles ?? []);
  const allFiles = [...located.files, ...external.map(({ path }) => path)];
  const hash = createHash('sha256');
  for (const file of files) hash.update(`${basename(file.path)}\0${file.headerHash}\n`);
  hash.update(found?.bytes ?? '');
  // No more than this is kept of the files: their headers take as much memory as all names.
  const opened = [...files, ...external].map(({ path, size, modified }) => ({ path, size, modified }));
  const format: ContainerFormat = isNative ? 'deepseek-native' : files[0]!.format;
  return {
    path,
    format,
    config,
    configPath: found?.path,
    tensors,
    files: allFiles,
    companions,
    extraFiles,
    widened,
    notes,
    fingerprint: hash.digest('hex'),
    assertUnchanged: () => assertUnchanged(opened),
    close: () => closeFiles(allFiles),
  };
}

async function assertUnchanged(files: readonly Pick<OpenedFile, 'path' | 'size' | 'modified'>[]): Promise<void> {
  for (const { path, size, modified } of files) {
    const now = await stat(path).catch((error: unknown) => {
      throw ioError(error, 'look again at', path);
    });
    if (now.size === size && now.mtimeMs === modified) continue;
    throw badInput('An input file was changed while it was read', {
      where: path,
      expected: `${size} bytes, of ${new Date(modified).toISOString()}`,
      got: `${now.size} bytes, of ${now.mtime.toISOString()}`,
      hint: 'Run the command again with --restart when nothing writes to the file any more.',
    });
  }
}
