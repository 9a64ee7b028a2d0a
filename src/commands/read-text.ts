import { readFile } from 'node:fs/promises';
import { badInput } from '../base/errors.js';
import { ioError } from '../base/files.js';

/** A text file that a user names; `what` names it in errors. Errors: cannot be read, is not UTF-8. */
export async function readText(path: string, what: string): Promise<string> {
  const bytes = await readFile(path).catch((error: unknown) => {
    throw ioError(error, `read ${what}`, path);
  });
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch {
    throw badInput(`${what.charAt(0).toUpperCase()}${what.slice(1)} is not UTF-8`, {
      where: path,
      hint: `Convert it first: iconv -f LATIN1 -t UTF-8 ${path}`,
    });
  }
}
