/**
 * The tokenizers library ends the whole process where a regular expression takes too many steps, and the expressions
 * come with the model. So those are refused that could take more steps at one place of the text than the text is long:
 * a repeated group of which a part may vary, and two open repetitions with something behind them that may fail. The
 * expressions of known tokenizers have neither.
 */
type Part =
  | { readonly kind: 'atom' | 'assertion' }
  | { readonly kind: 'group' | 'look'; readonly branches: readonly Repeated[][]; readonly atomic?: boolean };
interface Repeated {
  readonly part: Part;
  readonly min: number;
  readonly max: number;
}

/** Repetitions up to here count as a constant. */
const few = 64;

/** Why an expression (of Oniguruma) is not safe to be run; undefined where it is. */
export function unsafeExpression(source: string): string | undefined {
  if (source.length > 20_000) return 'longer than 20,000 characters';
  try {
    const branches = new Parser(source).all();
    for (const branch of branches) requireVaryingOnce(branch);
    const steps = Math.max(...branches.map((branch) => open(branch, false)));
    return steps > 1 ? `${steps} open repetitions in a row, with something behind them that may fail` : undefined;
  } catch (error) {
    if (error instanceof Unsafe) return error.message;
    throw error;
  }
}

class Unsafe extends Error {}

class Parser {
  #at = 0;
  #depth = 0;

  constructor(readonly source: string) {}

  all(): Repeated[][] {
    const branches = this.#branches();
    if (this.#at < this.source.length) throw new Unsafe('a bracket that nothing opens');
    return branches;
  }

  #branches(): Repeated[][] {
    if (++this.#depth > 30) throw new Unsafe('groups nested deeper than 30');
    const branches: Repeated[][] = [[]];
    while (this.#at < this.source.length && this.source[this.#at] !== ')') {
      if (this.source[this.#at] === '|') {
        this.#at++;
        branches.push([]);
      } else {
        const part = this.#part();
        if (part) branches.at(-1)!.push({ part, ...this.#quantifier() });
      }
    }
    this.#depth--;
    return branches;
  }

  #part(): Part | undefined {
    const letter = this.source[this.#at++]!;
    if (letter === '(') return this.#group();
    if (letter === '[') return this.#class();
    if (letter === '^' || letter === '$') return { kind: 'assertion' };
    if (letter !== '\\') return { kind: 'atom' };
    const escaped = this.source[this.#at++];
    if (escaped === undefined || /[1-9gkKX]/.test(escaped)) throw new Unsafe(`\\${escaped ?? ''}`);
    if (/[bBAzZGyY]/.test(escaped)) return { kind: 'assertion' };
    const braced = /^\{[^}]*\}/.exec(this.source.slice(this.#at, this.#at + 200));
    if (/[pPx]/.test(escaped) && braced) this.#at += braced[0].length;
    return { kind: 'atom' };
  }

  #group(): Part | undefined {
    const form = /^\?(?:#[^)]*\)|<?[=!]|>|:|<\w+>|[imx]*(?:-[imx]*)?[:)])/.exec(this.source.slice(this.#at, this.#at + 500))?.[0]; // prettier-ignore
    if (form === undefined && /[?*]/.test(this.source[this.#at] ?? '')) {
      throw new Unsafe(`(${this.source.slice(this.#at, this.#at + 3)}`);
    }
    this.#at += form?.length ?? 0;
    // A comment, or flags for what follows.
    if (form?.endsWith(')')) return undefined;
    const branches = this.#branches();
    if (this.source[this.#at++] !== ')') throw new Unsafe('a bracket that is not closed');
    if (form && /^\?<?[=!]$/.test(form)) return { kind: 'look', branches };
    return { kind: 'group', branches, atomic: form === '?>' };
  }

  #class(): Part {
    let depth = 1;
    // A bracket right behind the opening one stands for itself.
    if (this.source[this.#at] === '^') this.#at++;
    if (this.source[this.#at] === ']') this.#at++;
    for (; depth > 0; this.#at++) {
      const letter = this.source[this.#at];
      if (letter === undefined) throw new Unsafe('a class that is not closed');
      if (letter === '\\') this.#at++;
      else if (letter === '[') depth++;
      else if (letter === ']') depth--;
    }
    return { kind: 'atom' };
  }

  #quantifier(): { min: number; max: number } {
    const found = /^(?:[*+?]|\{(\d*)(,?)(\d*)\})/.exec(this.source.slice(this.#at, this.#at + 40));
    if (!found || found[0] === '{}' || found[0] === '{,}') return { min: 1, max: 1 };
    this.#at += found[0].length;
    const [sign, from, comma, to] = found;
    const next = this.source[this.#at];
    // Lazy, or (not behind braces) possessive.
    if (next === '?' || (next === '+' && !sign.startsWith('{'))) this.#at++;
    if (/^(?:[*+?]|\{\d*,?\d*\})/.test(this.source.slice(this.#at, this.#at + 40))) throw new Unsafe('a repetition of a repetition'); // prettier-ignore
    if (!sign.startsWith('{')) return { min: sign === '+' ? 1 : 0, max: sign === '?' ? 1 : Infinity };
    const [min, most] = [Number(from), to === '' ? Infinity : Number(to)];
    return { min, max: comma === '' ? min : most };
  }
}

const isOpen = ({ max }: Repeated): boolean => max > few;

/** Whether there are several ways to match one text, of several lengths or by several branches. */
const varies = (branches: readonly Repeated[][]): boolean =>
  branches.length > 1 ||
  branches.some((branch) =>
    branch.some(({ part, min, max }) => min !== max || (part.kind === 'group' && varies(part.branches))),
  );

function requireVaryingOnce(branch: readonly Repeated[]): void {
  for (const { part, max } of branch) {
    if (part.kind !== 'group' && part.kind !== 'look') continue;
    if (max > 4 && varies(part.branches)) throw new Unsafe('a repeated group of which a part may vary');
    for (const inner of part.branches) requireVaryingOnce(inner);
  }
}

const canBeEmpty = ({ part, min }: Repeated): boolean =>
  min === 0 || (part.kind === 'group' && part.branches.some((branch) => branch.every(canBeEmpty)));

/** Open repetitions of a branch that are tried again, one within the other, when what follows fails. */
function open(branch: readonly Repeated[], mayFail: boolean): number {
  let steps = 0;
  let fails = mayFail;
  for (const one of branch.toReversed()) {
    const { part } = one;
    if (isOpen(one) && fails) steps++;
    if (part.kind === 'group' || part.kind === 'look') {
      const inside = fails && part.kind === 'group' && !part.atomic;
      steps += Math.max(0, ...part.branches.map((inner) => open(inner, inside)));
    }
    fails ||= !canBeEmpty(one);
  }
  return steps;
}
