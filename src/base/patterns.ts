import { createContext, runInContext } from 'node:vm';
import { badInput } from './errors.js';

/** Longest time that expressions of one file may take, ms: real ones are through a whole model in a hundredth of it. */
const longest = 500;

/** Only evaluation in a context of its own can be ended by time. */
let context: { all?: () => ReadonlySet<string>[] } | undefined;

/**
 * Which of the texts each regular expression of a file matches, in order. Expressions come with models, and some never
 * end. Errors (kind 'input'): no regular expression; one that takes too long.
 */
export function matching(sources: readonly string[], texts: readonly string[], where: string): ReadonlySet<string>[] {
  const expressions = sources.map((source) => {
    try {
      return new RegExp(source);
    } catch (cause) {
      throw badInput('Not a regular expression', { where, got: JSON.stringify(source).slice(0, 200), cause });
    }
  });
  if (expressions.length === 0) return [];
  let current = 0;
  context ??= createContext({});
  context.all = (): ReadonlySet<string>[] =>
    expressions.map((expression, i) => {
      current = i;
      return new Set(texts.filter((text) => expression.test(text)));
    });
  try {
    return runInContext('all()', context, { timeout: longest }) as ReadonlySet<string>[];
  } catch (cause) {
    if ((cause as { code?: unknown }).code !== 'ERR_SCRIPT_EXECUTION_TIMEOUT') throw cause;
    throw badInput('A regular expression takes too long', {
      where,
      got: JSON.stringify(sources[current]).slice(0, 200),
      expected: `all ${sources.length} through ${texts.length} names in ${longest} ms`,
      cause,
    });
  }
}
