import { Random } from '../base/rng.js';
import { BpeModel } from './bpe.js';
import type { Tokenizer } from './tokenizer.js';

/** What gives a text its tokens. */
export type Encoder = Pick<Tokenizer, 'encode'>;

/** `<0x0A>`: a byte of a character that the vocabulary does not have. */
const byteToken = /^<0x[0-9A-F]{2}>$/;

/**
 * Encodes with BPE-dropout (Provilkov et al. 2020): each merge is left out with chance `p`, so that a model in training
 * sees a word in several spellings. The library cuts the text into words; the same seed gives the same tokens.
 * Errors: input, a tokenizer that is not plain BPE.
 */
export async function dropoutEncoder(tokenizer: Tokenizer, p: number, seed: number): Promise<Encoder> {
  const model = new BpeModel(await tokenizer.source(), tokenizer.path);
  const random = new Random(seed);
  const dropped = (): boolean => random.uniform() < p;
  const symbolsOf = (id: number): readonly number[] => {
    const token = tokenizer.token(id)!;
    // Unknown characters, too, stay as they are.
    return (model.byteFallback && byteToken.test(token) ? undefined : model.symbols(token)) ?? [id];
  };
  return {
    async encode(text, options) {
      const { ids, words } = await tokenizer.encodeWords(text, options);
      const out: number[] = [];
      for (let from = 0, to = 0; from < ids.length; from = to) {
        while (to < ids.length && words[to] === words[from]) to++;
        const word = ids.subarray(from, to);
        const whole = words[from] === undefined || word.some((id) => model.added.has(id));
        out.push(...(whole ? word : model.merge([...word].flatMap(symbolsOf), dropped)));
      }
      return Int32Array.from(out);
    },
  };
}
