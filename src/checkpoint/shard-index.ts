import { badInput } from '../base/errors.js';
import { isJsonObject, parseJson, tryJson } from '../formats/json.js';
import { Cursor } from '../formats/usual-json.js';
import { OpenFile } from '../formats/source.js';

/** Shards, and the tensors that each must hold. */
export type ShardIndex = ReadonlyMap<string, readonly string[]>;

/** Names of shards have five digits. */
const mostShards = 100_000;

const isPlainName = (name: string): boolean => name !== '' && name !== '.' && name !== '..' && !/[/\\\0]/.test(name);

/**
 * Reads `weight_map`, whose files must be plain names. A tensor may still stand in it twice: whoever compares it with the
 * files finds that something is wrong, and calls `refuseDuplicates` first.
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
  const result = new Map<string, string[]>();
  for (const tensor in map) {
    const name = map[tensor];
    if (typeof name !== 'string' || !isPlainName(name)) {
      throw badInput('weight_map must name plain files of the same folder', {
        where: `${path}, ${JSON.stringify(tensor)}`,
        got: JSON.stringify(name)?.slice(0, 120) ?? 'none',
      });
    }
    const tensors = result.get(name);
    if (tensors === undefined) result.set(name, [tensor]);
    else tensors.push(tensor);
    if (result.size > mostShards) throw badInput('The index names too many files', { where: path, expected: `at most ${mostShards}` }); // prettier-ignore
  }
  if (result.size === 0) throw badInput('The index names no tensors', { where: path });
  return result;
}

const [key, colon, open, comma, close] = ['"weight_map"', ':', '{', ',', '}'].map((text) => Buffer.from(text)) as [Buffer, Buffer, Buffer, Buffer, Buffer]; // prettier-ignore

/** Stands for the map while the rest of the index is read. */
const placeholder = '(weight_map)';

/**
 * An index in the form that the libraries write, without an object of 90,000 properties. Undefined when anything in it
 * is otherwise; then it is read as any JSON.
 */
function readUsual(bytes: Buffer, path: string): ShardIndex | undefined {
  const cursor = new Cursor(bytes, bytes.indexOf(key) + key.length);
  cursor.skipSpace();
  if (cursor.at < key.length || !cursor.pass(colon)) return undefined;
  cursor.skipSpace();
  if (!cursor.pass(open)) return undefined;
  const head = bytes.subarray(0, cursor.at - 1);
  const index = new Map<string, string[]>();
  let quoted: Buffer | undefined;
  let tensors: string[] = [];
  for (let more = true; more;) {
    cursor.skipSpace();
    const tensor = cursor.string();
    if (tensor === undefined) return undefined;
    cursor.skipSpace();
    if (!cursor.pass(colon)) return undefined;
    cursor.skipSpace();
    // Mostly the file of the tensor before.
    if (!quoted || !cursor.pass(quoted)) {
      const name = cursor.string();
      if (name === undefined || !isPlainName(name)) return undefined;
      quoted = Buffer.from(`"${name}"`);
      tensors = index.get(name) ?? [];
      index.set(name, tensors);
      if (index.size > mostShards) return undefined;
    }
    tensors.push(tensor);
    cursor.skipSpace();
    more = cursor.pass(comma);
  }
  if (!cursor.pass(close)) return undefined;
  const tail = bytes.subarray(cursor.at);
  if (head.length + tail.length > 65_536 || head.includes(placeholder) || tail.includes(placeholder)) return undefined;
  const whole = tryJson(Buffer.concat([head, Buffer.from(`"${placeholder}"`), tail]), { where: path, lenient: true });
  return isJsonObject(whole) && whole['weight_map'] === placeholder ? index : undefined;
}
