import type { Random } from '../../src/base/rng.js';
import { edge, nearby, oddTexts, pick, shuffled } from './bytes.js';

const token = /"(?:[^"\\]|\\.)*"|-?\d[\d.eE+-]*|[a-zA-Z]+|\s+|[^]/g;
const oddNumbers = [
  '-0',
  '1.0',
  '1e3',
  '01',
  '1e400',
  '-1',
  '9007199254740993',
  '18446744073709551615',
  '1'.repeat(400),
];
const oddParts = [
  '[]',
  '{}',
  'null',
  'NaN',
  '-Infinity',
  'true',
  '"\\ud800"',
  '"\\u0000"',
  '[[[[[[0]]]]]]',
  ',',
  ':',
  '"',
];

/** One change to the tokens of a JSON text. */
export function reshapeJson(random: Random, text: string): string {
  const tokens = text.match(token) ?? [];
  if (random.below(3000) === 0) return '['.repeat(200_000);
  if (random.below(6) === 0) return pair(random, tokens);
  return shuffled(random, tokens, (item) => {
    if (/^-?\d/.test(item)) return otherNumber(random, item);
    if (item.startsWith('"')) return otherText(random, item, tokens);
    return pick(random, [...oddParts, ...tokens]);
  }).join('');
}

function otherNumber(random: Random, item: string): string {
  if (random.below(3) === 0) return pick(random, oddNumbers);
  return /^\d{1,19}$/.test(item) ? nearby(random, BigInt(item)).toString() : edge(random).toString();
}

function otherText(random: Random, item: string, tokens: readonly string[]): string {
  if (random.below(2) === 0) return pick(random, tokens.filter((other) => other.startsWith('"'))); // prettier-ignore
  return random.below(8) === 0 ? pick(random, oddParts) : JSON.stringify(pick(random, oddTexts));
}

/** A `"key": value` doubled, left out or moved, so that the text stays JSON. */
function pair(random: Random, tokens: readonly string[]): string {
  const keys = tokens.flatMap((item, i) => (item.startsWith('"') && /^\s*:$/.test(tokens[i + 1] ?? '') ? [i] : []));
  if (keys.length === 0) return tokens.join('');
  const from = pick(random, keys);
  const to = pick(random, keys);
  let [end, depth] = [from + 2, 0];
  for (; end < tokens.length; end++) {
    if (depth === 0 && (tokens[end] === ',' || tokens[end] === '}')) break;
    depth += /[[{]/.test(tokens[end]!) ? 1 : /[\]}]/.test(tokens[end]!) ? -1 : 0;
  }
  const part = tokens.slice(from, end);
  const out = [...tokens];
  out.splice(to, 0, ...part, ',');
  return out.join('');
}
