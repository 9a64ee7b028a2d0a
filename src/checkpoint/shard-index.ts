import { badInput } from '../base/errors.js';
import { scanner } from '../base/scanner.js';
import { isJsonObject, parseJson, tryJson } from '../formats/json.js';
import { OpenFile } from '../formats/source.js';
import type { NamesInFile } from '../formats/types.js';

/** Shards, and the tensors that each must hold. */
export type ShardIndex = ReadonlyMap<string, NamesInFile | readonly string[]>;

/** The names of one shard of an index. */
export function namesOf(names: NamesInFile | readonly string[]): readonly string[] {
  if (!('places' in names)) return names;
  const { bytes, places } = names;
  return Array.from({ length: places.length / 2 }, (_, i) => bytes.toString('latin1', places[2 * i], places[2 * i + 1])); // prettier-ignore
}

/** Names of shards have five digits. */
const mostShards = 100_000;

const isPlainName = (name: string): boolean => name !== '' && name !== '.' && name !== '..' && !/[/\\\0]/.test(name);

/** Reads `weight_map`, whose files must be plain names, and whose tensors stand in it once. */
export const readIndex = (path: string): ShardIndex => parseIndex(readBytes(path), path);

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

const opening = /"weight_map"[ \t\r\n]*:[ \t\r\n]*\{/;
const longestHead = 65_536;

/** Stands for the map while the rest of the index is read. */
const placeholder = '(weight_map)';

/**
 * An index in the form that the libraries write, without an object of 90,000 properties. Undefined when anything in it
 * is otherwise; then it is read as any JSON.
 */
function readUsual(bytes: Buffer, path: string): ShardIndex | undefined {
  const start = opening.exec(bytes.toString('latin1', 0, longestHead));
  if (start === null) return undefined;
  const from = start.index + start[0].length;
  const found = scanner()?.index(bytes, from);
  if (!found || found.names.length > mostShards) return undefined;
  const [head, tail] = [bytes.subarray(0, from - 1), bytes.subarray(found.end)];
  if (tail.length > longestHead || head.includes(placeholder) || tail.includes(placeholder)) return undefined;
  const whole = tryJson(Buffer.concat([head, Buffer.from(`"${placeholder}"`), tail]), { where: path, lenient: true });
  if (!isJsonObject(whole) || whole['weight_map'] !== placeholder) return undefined;
  const names = namesOf({ bytes, places: found.files });
  if (!names.every(isPlainName)) return undefined;
  return new Map(names.map((name, i) => [name, { bytes, places: found.names[i]! }]));
}
