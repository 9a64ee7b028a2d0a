import { createHash } from 'node:crypto';
import { z } from 'zod';
import { badInput } from '../../base/errors.js';
import { readJsonFile, writeFileAtomic } from '../../base/files.js';

const envelope = z.strictObject({ version: z.number(), sha256: z.string(), content: z.unknown() });
const version = 1;
const digestOf = (content: unknown): string => createHash('sha256').update(JSON.stringify(content)).digest('hex');

/** Writes JSON with its version and checksum; returns the checksum, which names just this content. */
export async function writeSealed(path: string, content: unknown): Promise<string> {
  const sha256 = digestOf(content);
  await writeFileAtomic(path, `${JSON.stringify({ version, sha256, content }, null, 1)}\n`);
  return sha256;
}

/**
 * Reads it back; undefined when there is no such file. Errors: input, for another version, content that was changed
 * since, and content that `schema` does not have.
 */
export async function readSealed<T extends z.ZodType>(
  path: string,
  schema: T,
  hint: string,
): Promise<{ content: z.infer<T>; sha256: string } | undefined> {
  const json = await readJsonFile(path);
  if (json === undefined) return undefined;
  const outer = checked(envelope, json, path, hint);
  if (outer.version !== version) {
    throw badInput('The file was made by another version of this tool', { where: path, expected: `version ${version}`, got: `version ${outer.version}`, hint }); // prettier-ignore
  }
  if (digestOf(outer.content) !== outer.sha256) {
    throw badInput('The file was changed after it was made: its checksum does not fit', { where: path, hint });
  }
  return { content: checked(schema, outer.content, path, hint), sha256: outer.sha256 };
}

function checked<T extends z.ZodType>(schema: T, value: unknown, path: string, hint: string): z.infer<T> {
  const parsed = schema.safeParse(value);
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  const where = `${path}${issue && issue.path.length > 0 ? `: ${issue.path.join('.')}` : ''}`;
  throw badInput('The file has another form than expected', { where, got: issue?.message ?? 'something else', hint });
}
