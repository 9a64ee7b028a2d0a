import { badInput } from '../base/errors.js';
import { decodeUtf8, isJsonObject, parseJson, tryJson } from '../formats/json.js';
import { Cursor } from '../formats/usual-json.js';
import { OpenFile } from '../formats/source.js';

/** Shards, and the tensors that each must hold. */
export type ShardIndex = ReadonlyMap<string, ReadonlySet<string>>;

/** Names of shards have five digits. */
const mostShards = 100_000;

const isPlainName = (name: string): boolean => name !== '' && name !== '.' && name !== '..' && !/[/\\\0]/.test(name);

/**
 * Reads `weight_map`, whose files must be plain names. A tensor may still stand in it for two files: whoever compares it
 * with the files finds that one of them is wrong, and calls `refuseDuplicates` first.
 */
export const readIndex = (path: string): ShardIndex => parseIndex(readBytes(path), path);

/** Refuses an index that names a tensor twice. */
export function refuseDuplicates(path: string): void {
  readAny(readBytes(path), path);
}

function readBytes(path: string): Buffer {
  using file = new OpenFile(path);
  if (file.size > 64 * 2 ** 20) throw badInput('The index is too large', { where: path, got: `${file.size} bytes` });
  return file.read(0, file.size, 'index');
}

/** The same of an index's bytes; `path` is what errors name. */
export const parseIndex = (bytes: Buffer, path: string): ShardIndex => readUsual(bytes, path) ?? readAny(bytes, path);

function readAny(bytes: Buffer, path: string): ShardIndex {
  const index = parseJson(bytes, { where: path, lenient: true, maxValues: 2_000_000 });
  const map = isJsonObject(index) ? index['weight_map'] : undefined;
  if (!isJsonObject(map)) throw badInput('The index has no weight_map', { where: path });
  const result = new Map<string, Set<string>>();
  for (const tensor in map) {
    const name = map[tensor];
    if (typeof name !== 'string' || !isPlainName(name)) {
      throw badInput('weight_map must name plain files of the same folder', {
        where: `${path}, ${JSON.stringify(tensor)}`,
        got: JSON.stringify(name)?.slice(0, 120) ?? 'none',
      });
    }
    const tensors = result.get(name);
    if (tensors === undefined) result.set(name, new Set([tensor]));
    else tensors.add(tensor);
    if (result.size > mostShards) throw badInput('The index names too many files', { where: path, expected: `at most ${mostShards}` }); // prettier-ignore
  }
  if (result.size === 0) throw badInput('The index names no tensors', { where: path });
  return result;
}

/** Stands for the map while the rest of the index is read. */
const placeholder = '(weight_map)';

/**
 * An index in the form that the libraries write, without an object of 90,000 properties. Undefined when anything in it
 * is otherwise; then it is read as any JSON.
 */
function readUsual(bytes: Buffer, path: string): ShardIndex | undefined {
  const text = decodeUtf8(bytes);
  const start = text === undefined ? undefined : /"weight_map"\s*:\s*\{/.exec(text);
  if (text === undefined || !start || text.includes(placeholder)) return undefined;
  const from = start.index + start[0].length;
  const index = new Map<string, Set<string>>();
  const cursor = new Cursor(text, from);
  let quoted = '';
  let tensors = new Set<string>();
  for (let more = true; more;) {
    cursor.skipSpace();
    const tensor = cursor.string();
    if (tensor === undefined) return undefined;
    cursor.skipSpace();
    if (!cursor.pass(':')) return undefined;
    cursor.skipSpace();
    // Mostly the file of the tensor before.
    if (quoted === '' || !cursor.pass(quoted)) {
      const name = cursor.string();
      if (name === undefined || !isPlainName(name)) return undefined;
      quoted = `"${name}"`;
      tensors = index.get(name) ?? new Set();
      index.set(name, tensors);
      if (index.size > mostShards) return undefined;
    }
    const before = tensors.size;
    if (tensors.add(tensor).size === before) return undefined;
    cursor.skipSpace();
    more = cursor.pass(',');
  }
  if (!cursor.pass('}')) return undefined;
  const rest = `${text.slice(0, from - 1)}"${placeholder}"${text.slice(cursor.at)}`;
  if (rest.length > 65_536) return undefined;
  const whole = tryJson(rest, { where: path, lenient: true });
  return isJsonObject(whole) && whole['weight_map'] === placeholder ? index : undefined;
}
