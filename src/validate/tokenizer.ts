import { companionName } from '../checkpoint/config.js';
import type { OpenModel } from '../arch/open.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import type { TokenizerResult } from './report.js';

/** Whether a checkpoint brings a tokenizer.json, beside its weights or inside. */
export const bringsTokenizer = ({ checkpoint }: Pick<OpenModel, 'checkpoint'>): boolean =>
  checkpoint.companions.some((path) => companionName(path) === 'tokenizer.json') ||
  checkpoint.extraFiles.has('tokenizer.json');

/** Whether both tokenizers give the same ids for the same texts, with and without what they put around a text. */
export async function compareTokenizers(
  reference: Tokenizer,
  candidate: Tokenizer,
  texts: readonly { readonly name: string; readonly text: string }[],
): Promise<TokenizerResult> {
  const mismatches: { text: string; at: number; reference: string; candidate: string }[] = [];
  let tokens = 0;
  const cases = [
    ...texts.map(({ name, text }) => ({ name, text, special: false })),
    { name: 'start and end of a text', text: 'a', special: true },
  ];
  for (const { name, text, special } of cases) {
    const [a, b] = await Promise.all([reference, candidate].map((t) => t.encode(text, { special })));
    tokens += a!.length;
    const at = firstDifference(a!, b!);
    if (at < 0) continue;
    const spell = (t: Tokenizer, ids: Int32Array): string => {
      const id = ids[at];
      return id === undefined ? '(end)' : `${id} ${JSON.stringify(t.token(id) ?? '')}`;
    };
    mismatches.push({ text: name, at, reference: spell(reference, a!), candidate: spell(candidate, b!) });
  }
  return {
    tokens,
    mismatches,
    vocabulary: { reference: reference.vocabSize, candidate: candidate.vocabSize },
    dropout: { reference: dropoutOf(await reference.source()), candidate: dropoutOf(await candidate.source()) },
  };
}

function firstDifference(a: Int32Array, b: Int32Array): number {
  const at = a.findIndex((id, i) => id !== b[i]);
  if (at >= 0) return at;
  return b.length > a.length ? a.length : -1;
}

/** "dropout" of a BPE model in the text of a tokenizer.json; null where there is none. */
function dropoutOf(json: string): number | null {
  const { model } = JSON.parse(json) as { model?: { dropout?: unknown } };
  return typeof model?.dropout === 'number' ? model.dropout : null;
}
