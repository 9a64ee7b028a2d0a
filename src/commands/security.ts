import { readdir } from 'node:fs/promises';
import { basename } from 'node:path';
import { badInput, ConvertError } from '../base/errors.js';
import { columns } from '../base/text.js';
import { detectFormat } from '../checkpoint/detect.js';
import { locate } from '../checkpoint/locate.js';
import { openCheckpoint } from '../checkpoint/open.js';
import { OpenFile } from '../formats/source.js';
import { torchRefusals } from '../formats/torch.js';
import type { CommandResult, Io } from './types.js';

interface Finding {
  /** `danger`: loading it with common tools can run code; `caution`: only when asked to trust it. */
  readonly level: 'danger' | 'caution';
  readonly where: string;
  readonly what: string;
}

/** What could run code when another program loads the model. Nothing of it is run here. */
export async function inspectSecurity(path: string, io: Io): Promise<CommandResult> {
  const { files, folder, file } = await locate(path);
  const findings: Finding[] = [];
  for (const weights of files) findings.push(...inspectFile(weights));
  const python = file === undefined ? (await readdir(folder)).filter((name) => name.endsWith('.py')) : [];
  for (const where of python) {
    findings.push({ level: 'caution', where, what: 'Python code; run by loaders with trust_remote_code=True' });
  }
  if (findings.every(({ level }) => level !== 'danger')) {
    const checkpoint = await openCheckpoint(path, { configOptional: true });
    if (checkpoint.config.auto_map !== undefined) {
      const where = basename(checkpoint.configPath ?? 'config.json');
      findings.push({ level: 'caution', where, what: 'auto_map names code; run with trust_remote_code=True' });
    }
    await checkpoint.close();
  }
  const danger = findings.filter(({ level }) => level === 'danger');
  const mark = { danger: io.paint.red('danger'), caution: io.paint.yellow('caution') };
  return {
    data: { path, files, findings },
    text:
      findings.length === 0
        ? `Nothing in ${path} could run code: ${files.length} ${files.length === 1 ? 'file' : 'files'} with tensors only.`
        : columns(findings.map(({ level, where, what }) => [mark[level], where, what]), 'lll'), // prettier-ignore
    ...(danger.length > 0 && {
      failure: badInput('Loading this model elsewhere can run code', {
        where: danger[0]!.where,
        got: danger[0]!.what,
        hint: 'Get the weights as safetensors from a source that you trust. Nothing was run here.',
      }),
    }),
  };
}

function inspectFile(path: string): Finding[] {
  using source = new OpenFile(path);
  if (detectFormat(source) !== 'torch') return [];
  try {
    return torchRefusals(source).map(({ name, position }) => ({
      level: 'danger',
      where: `${basename(path)}, byte ${position}`,
      what: `the pickle names ${name}`,
    }));
  } catch (error) {
    if (!(error instanceof ConvertError) || error.kind !== 'input') throw error;
    return [{ level: 'danger', where: basename(path), what: error.message.split('\n')[0]! }];
  }
}
