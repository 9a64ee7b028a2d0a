import { readFileSync, statSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { companionName, findCompanions } from '../../checkpoint/config.js';
import type { Tokenizer } from '../../tokenizer/tokenizer.js';
import type { Roles } from './rows.js';

/** What belongs to a tokenizer among the files beside a model. */
const tokenizerFile = /^(tokenizer|special_tokens_map|added_tokens|vocab|merges|spiece|sentencepiece|chat_template)\b|\.tiktoken$|^tokenization_\w+\.py$/; // prettier-ignore
const isTokenizerFile = (path: string): boolean => tokenizerFile.test(companionName(path));

/** The model's companions without its tokenizer, and the files of the new one: all of its folder, or the lone file. */
export async function filesOf(
  companions: readonly string[],
  given: string,
  tokenizer: Tokenizer,
): Promise<{ companions: string[]; extraFiles: Map<string, string> }> {
  const folder = statSync(given).isDirectory();
  const brought = folder ? (await findCompanions(given, undefined)).filter(isTokenizerFile) : [];
  return {
    companions: [...companions.filter((path) => !isTokenizerFile(path)), ...brought],
    extraFiles: new Map([['tokenizer.json', await tokenizer.source()]]),
  };
}

/** Ids of the tokens that tokenizer_config.json beside the tokenizer names: BOS, EOS, padding. */
export function rolesOf(tokenizer: Tokenizer, folder = dirname(tokenizer.path)): Roles {
  let config: Record<string, unknown>;
  try {
    config = JSON.parse(readFileSync(join(folder, 'tokenizer_config.json'), 'utf8')) as Record<string, unknown>;
  } catch {
    return {};
  }
  return Object.fromEntries(
    ['bos', 'eos', 'pad'].flatMap((role) => {
      const named = config[`${role}_token`];
      const content = typeof named === 'string' ? named : (named as { content?: unknown } | null | undefined)?.content;
      const id = typeof content === 'string' ? tokenizer.id(content) : undefined;
      return id === undefined ? [] : [[role, id]];
    }),
  );
}
