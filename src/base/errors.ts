/**
 * The one error class. `kind` decides the exit code; `hint` is the next thing to try.
 * Exit codes: 1 bad input, 2 usage, 3 quality gate, 4 resources, 70 our bug, 75 interrupted and resumable.
 */
export const exitCodes = {
  input: 1,
  usage: 2,
  gate: 3,
  resource: 4,
  internal: 70,
  interrupted: 75,
} as const;

export type ErrorKind = keyof typeof exitCodes;

export interface ErrorFacts {
  /** File, tensor, byte offset, config key: as exact as is known. */
  where?: string;
  got?: string;
  expected?: string;
  /** What the user can do next; a command where there is one. */
  hint?: string;
  cause?: unknown;
}

export class ConvertError extends Error {
  readonly kind: ErrorKind;
  readonly facts: ErrorFacts;

  constructor(kind: ErrorKind, what: string, facts: ErrorFacts = {}) {
    super(describe(what, facts), facts.cause === undefined ? undefined : { cause: facts.cause });
    this.name = 'ConvertError';
    this.kind = kind;
    this.facts = facts;
  }

  get exitCode(): number {
    return exitCodes[this.kind];
  }
}

function describe(what: string, { where, got, expected, hint }: ErrorFacts): string {
  let text = what;
  if (where !== undefined) text += ` (${where})`;
  if (expected !== undefined || got !== undefined) {
    const sides = [expected !== undefined && `expected ${expected}`, got !== undefined && `got ${got}`];
    text += `: ${sides.filter(Boolean).join(', ')}`;
  }
  if (hint !== undefined) text += `\n  ${hint}`;
  return text;
}

export const badInput = (what: string, facts?: ErrorFacts): ConvertError => new ConvertError('input', what, facts);
export const badUsage = (what: string, facts?: ErrorFacts): ConvertError => new ConvertError('usage', what, facts);
export const noResource = (what: string, facts?: ErrorFacts): ConvertError => new ConvertError('resource', what, facts);
/** A broken promise between our own parts. */
export const bug = (what: string, facts?: ErrorFacts): ConvertError => new ConvertError('internal', what, facts);

/** The name among `known` that `given` most likely meant, or undefined when nothing is close. */
export function didYouMean(given: string, known: Iterable<string>): string | undefined {
  let best: string | undefined;
  let bestDistance = Math.max(2, Math.floor(given.length / 3)) + 1;
  for (const name of known) {
    const distance = editDistance(given.toLowerCase(), name.toLowerCase(), bestDistance);
    if (distance < bestDistance) [best, bestDistance] = [name, distance];
  }
  return best;
}

function editDistance(a: string, b: string, limit: number): number {
  if (Math.abs(a.length - b.length) >= limit) return limit;
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next.push(Math.min(row[j]! + 1, next[j - 1]! + 1, row[j - 1]! + (a[i - 1] === b[j - 1] ? 0 : 1)));
    }
    row = next;
  }
  return row[b.length]!;
}
