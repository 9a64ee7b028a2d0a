import { badInput } from '../base/errors.js';
import { decodeUtf8, isJsonObject, parseJson, tryJson } from '../formats/json.js';
import { Cursor } from '../formats/usual-json.js';
import { OpenFile } from '../formats/source.js';

const isPlainName = (name: string): boolean => name !== '' && name !== '.' && name !== '..' && !/[/\\\0]/.test(name);

/** Reads `weight_map`: tensor name -> plain file name. */
export function readIndex(path: string): Map<string, string> {
  using file = new OpenFile(path);
  if (file.size > 64 * 2 ** 20) throw badInput('The index is too large', { where: path, got: `${file.size} bytes` });
  return parseIndex(file.read(0, file.size, 'index'), path);
}

/** The same of an index's bytes; `path` is what errors name. */
export function parseIndex(bytes: Buffer, path: string): Map<string, string> {
  const usual = readUsual(bytes, path);
  if (usual !== undefined) return usual;
  const index = parseJson(bytes, { where: path, lenient: true, maxValues: 2_000_000 });
  const map = isJsonObject(index) ? index['weight_map'] : undefined;
  if (!isJsonObject(map)) throw badInput('The index has no weight_map', { where: path });
  const result = new Map<string, string>();
  for (const tensor in map) {
    const name = map[tensor];
    if (typeof name !== 'string' || !isPlainName(name)) {
      throw badInput('weight_map must name plain files of the same folder', {
        where: `${path}, ${JSON.stringify(tensor)}`,
        got: JSON.stringify(name)?.slice(0, 120) ?? 'none',
      });
    }
    result.set(tensor, name);
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
function readUsual(bytes: Buffer, path: string): Map<string, string> | undefined {
  const text = decodeUtf8(bytes);
  const start = text === undefined ? undefined : /"weight_map"\s*:\s*\{/.exec(text);
  if (text === undefined || !start || text.includes(placeholder)) return undefined;
  const from = start.index + start[0].length;
  const map = new Map<string, string>();
  const known = new Map<string, string>();
  const cursor = new Cursor(text, from);
  for (let more = true; more;) {
    cursor.skipSpace();
    const tensor = cursor.string();
    if (tensor === undefined || map.has(tensor)) return undefined;
    cursor.skipSpace();
    if (!cursor.pass(':')) return undefined;
    cursor.skipSpace();
    const name = cursor.string();
    if (name === undefined) return undefined;
    const shared = known.get(name); // one string for all tensors of a file
    if (shared === undefined && !isPlainName(name)) return undefined;
    if (shared === undefined) known.set(name, name);
    map.set(tensor, shared ?? name);
    cursor.skipSpace();
    more = cursor.pass(',');
  }
  if (!cursor.pass('}')) return undefined;
  const rest = `${text.slice(0, from - 1)}"${placeholder}"${text.slice(cursor.at)}`;
  if (rest.length > 65_536) return undefined;
  const index = tryJson(rest, { where: path, lenient: true });
  return isJsonObject(index) && index['weight_map'] === placeholder ? map : undefined;
}
