/** One cut of text into words: by a regular expression of tokenizer.json, which native/bpe_words.cc spells out. */
interface Stage {
  /** Its name in native code. */
  readonly name: string;
  /** Undefined: the one inside the ByteLevel pre-tokenizer. */
  readonly pattern: string | undefined;
}

const llama3 = (digits: string): string =>
  `(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}${digits}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+`;
const digit: Stage = { name: 'digit', pattern: '\\p{N}' };
const digits3: Stage = { name: 'digits3', pattern: '\\p{N}{1,3}' };

/** How text is cut into words before pairs are merged: no token reaches over a cut. */
export const preTokenizers = {
  /** GPT-2's: words with the space in front of them, numbers, signs. */
  gpt2: [{ name: 'gpt2', pattern: undefined }],
  /** Llama 3's: numbers in threes, line ends apart, contractions in either case. */
  llama3: [{ name: 'llama3', pattern: llama3('{1,3}') }],
  /** Qwen 2's: as Llama 3's, with single digits. */
  qwen2: [{ name: 'qwen2', pattern: llama3('') }],
  /** DeepSeek-V3's: numbers in threes and Chinese and Japanese apart. */
  'deepseek-v3': [
    digits3,
    { name: 'cjk', pattern: '[一-龥぀-ゟ゠-ヿ]+' },
    {
      name: 'deepseek3',
      pattern:
        '[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+',
    },
  ],
} as const satisfies Readonly<Record<string, readonly Stage[]>>;

export type PreTokenizerName = keyof typeof preTokenizers;
export const preTokenizerNames = Object.keys(preTokenizers) as PreTokenizerName[];

/** Numbers cut before all else. */
export const digitCuts = { one: digit, three: digits3 } as const;
export type DigitCut = keyof typeof digitCuts;

export const stagesOf = (preTokenizer: PreTokenizerName, digits: DigitCut | undefined): readonly Stage[] => [
  ...(digits === undefined ? [] : [digitCuts[digits]]),
  ...preTokenizers[preTokenizer],
];

/** The `pre_tokenizer` of tokenizer.json. */
export function preTokenizerJson(stages: readonly Stage[]): Readonly<Record<string, unknown>> {
  const inner = stages.some(({ pattern }) => pattern === undefined);
  const byteLevel = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: inner };
  const cuts = stages.flatMap(({ pattern }) =>
    pattern === undefined ? [] : [{ type: 'Split', pattern: { Regex: pattern }, behavior: 'Isolated', invert: false }],
  );
  return cuts.length === 0 ? byteLevel : { type: 'Sequence', pretokenizers: [...cuts, byteLevel] };
}
