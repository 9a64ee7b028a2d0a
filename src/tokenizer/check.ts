import { badInput } from '../base/errors.js';
import { unsafeExpression } from './expressions.js';

type Step = Readonly<Record<string, unknown>>;

/** No vocabulary comes near. */
const maxId = 2 ** 24;

/**
 * Refuses what the tokenizers library would end the process over, at once or with the first text: it takes the parts of
 * a tokenizer.json as they come. Errors: input.
 */
export function requireSound(text: string, where: string): void {
  let json: Step;
  try {
    json = (JSON.parse(text) ?? {}) as Step;
  } catch (cause) {
    throw badInput('The tokenizer is no JSON', { where, got: (cause as Error).message, cause });
  }
  const fail = (what: string, got: string, expected: string): Error =>
    badInput(`The tokenizer ${what}`, { where, got: got.slice(0, 300), expected });
  const steps = ['normalizer', 'pre_tokenizer', 'post_processor', 'decoder'].flatMap((key) => stepsOf(json[key]));
  for (const step of steps) {
    const { type, pattern, precompiled_charsmap: map } = step;
    const expression = isStep(pattern) ? pattern.Regex : undefined;
    const unsafe = typeof expression === 'string' ? unsafeExpression(expression) : undefined;
    if (unsafe !== undefined) throw fail('has a regular expression that can take too long', `${String(expression)} (${unsafe})`, 'one whose steps do not multiply'); // prettier-ignore
    if (type === 'Precompiled') requireCharsmap(map, fail);
    if (type === 'FixedLength' && step.length === 0) throw fail('cuts texts into pieces of nothing', 'FixedLength of 0', 'at least 1'); // prettier-ignore
    if (type === 'Strip' && typeof step.stop === 'number' && step.stop > 0) throw fail('strips the ends of tokens, which may be shorter', `stop ${step.stop}`, '0'); // prettier-ignore
    if (type === 'TemplateProcessing') requireTemplate(step, fail);
  }
  const ids = [
    ...list(json.added_tokens).map((token) => (isStep(token) ? token.id : undefined)),
    ...(isStep(json.model) && isStep(json.model.vocab) ? Object.values(json.model.vocab) : []),
  ];
  const odd = ids.find((id) => typeof id === 'number' && !(id >= 0 && id < maxId));
  if (odd !== undefined) throw fail('has an id that no vocabulary reaches', JSON.stringify(odd), `0 to ${maxId - 1}`);
}

type Fail = (what: string, got: string, expected: string) => Error;

const isStep = (value: unknown): value is Step => typeof value === 'object' && value !== null && !Array.isArray(value);
const list = (value: unknown): readonly unknown[] => (Array.isArray(value) ? value : []);

/** A step and, where it is a sequence, those in it. */
function stepsOf(value: unknown): Step[] {
  const found: Step[] = [];
  const left: unknown[] = [value];
  while (left.length > 0) {
    const step = left.pop();
    if (!isStep(step)) continue;
    found.push(step);
    for (const key of ['normalizers', 'pretokenizers', 'processors', 'decoders']) left.push(...list(step[key]));
  }
  return found;
}

/** Every special token of a template is described, and a text by itself is the first of two. */
function requireTemplate({ single, pair, special_tokens: tokens }: Step, fail: Fail): void {
  const second = list(single).some((piece) => isStep(piece) && isStep(piece.Sequence) && piece.Sequence.id === 'B');
  if (second) throw fail('puts a second text beside the only one', 'Sequence B', 'Sequence A');
  for (const piece of [...list(single), ...list(pair)]) {
    const special = isStep(piece) ? piece.SpecialToken : undefined;
    const id = isStep(special) ? special.id : undefined;
    if (typeof id !== 'string' || (isStep(tokens) && Object.hasOwn(tokens, id))) continue;
    throw fail('puts a token around texts that it does not describe', JSON.stringify(id), 'one of its special_tokens');
  }
}

const utf8 = new TextDecoder('utf-8', { fatal: true });

/**
 * SentencePiece's map of characters: bytes of a double-array trie (u32), its units, and the texts that its leaves point to.
 * Each step from a node that can be reached stays inside, and each leaf points to where a character begins.
 */
function requireCharsmap(map: unknown, fail: Fail): void {
  const wrong = (what: string): Error => fail('has a damaged map of characters', what, 'one that SentencePiece made');
  const bytes = typeof map === 'string' ? Buffer.from(map, 'base64') : Buffer.alloc(0);
  if (bytes.length < 4) throw wrong(`${bytes.length} bytes`);
  const size = bytes.readUInt32LE(0);
  if (size === 0 || size % 4 !== 0 || 4 + size > bytes.length)
    throw wrong(`a trie of ${size} bytes in ${bytes.length}`);
  const texts = bytes.subarray(4 + size);
  try {
    utf8.decode(texts);
  } catch {
    throw wrong('texts that are not UTF-8');
  }
  const count = size / 4;
  const unit = (at: number): number => bytes.readUInt32LE(4 + 4 * at);
  const offset = (value: number): number => (value >>> 10) << ((value & 512) >>> 6);
  const seen = new Uint8Array(count);
  const left = [0 ^ offset(unit(0))];
  while (left.length > 0) {
    const node = left.pop()!;
    if (node >= count) throw wrong(`unit ${node} of ${count}`);
    if (seen[node]) continue;
    seen[node] = 1;
    for (let byte = 1; byte < 256; byte++) {
      const at = node ^ byte;
      if (at >= count) throw wrong(`unit ${at} of ${count}`);
      const value = unit(at);
      if ((value & 0x8000_00ff) >>> 0 !== byte) continue;
      const next = (at ^ offset(value)) >>> 0;
      if (next >= count) throw wrong(`unit ${next} of ${count}`);
      const text = unit(next) & 0x7fff_ffff;
      const points = (value & 256) !== 0;
      if (points && (text > texts.length || ((texts[text] ?? 0) & 0xc0) === 0x80)) throw wrong(`a text at byte ${text} of ${texts.length}`); // prettier-ignore
      left.push(next);
    }
  }
}
