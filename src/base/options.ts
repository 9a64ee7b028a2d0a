import { badUsage, bug, didYouMean } from './errors.js';

/**
 * Options are data. One table per command gives its flags, `DEEPSEEK_CONVERT_<FLAG>` in the environment, keys of
 * `--config-file`, defaults, checks, help and shell completion. The key `groupSize` is the flag `--group-size`.
 */
export interface Option<T> {
  readonly kind: 'flag' | 'value' | 'list';
  readonly help: string;
  /** What `--no-name` does, of a flag that is on by default. */
  readonly off: string | undefined;
  readonly default: T;
  readonly required: boolean;
  /** One letter: `o` for `-o`. */
  readonly short: string | undefined;
  /** Other long names, not shown in help: `output-model`. */
  readonly aliases: readonly string[];
  /** What the value is called in help: `n` for `--bits <n>`. */
  readonly value: string;
  /** The only values there are; for help, completion and did-you-mean. */
  readonly choices: readonly string[] | undefined;
  /** What numbers the value may be, for schemas; undefined for other values. */
  readonly numbers: (NumberRange & { readonly whole: boolean }) | undefined;
  /** What help says in place of the default: `what the machine has`. */
  readonly defaultNote: string | undefined;
  /** Heading in help under which the option stands. */
  readonly section: string | undefined;
  /** Key of the config file under which the option may stand as well: `gates` for `gates: { max-kl: 0.1 }`. */
  readonly group: string | undefined;
  /** A list given in one string (environment) is split here. */
  readonly separator: string | undefined;
  /** One value's text -> value; throws `Expected`. */
  readonly read: (text: string) => unknown;
}

export type OptionTable = Readonly<Record<string, Option<unknown>>>;

/** What a command gets: one value for each option, checked. */
export type Values<O> = { readonly [K in keyof O]: O[K] extends Option<infer T> ? T : never };

export interface OptionSpec<T> {
  readonly help: string;
  readonly default?: T;
  readonly required?: boolean;
  readonly short?: string;
  readonly aliases?: readonly string[];
  readonly value?: string;
  readonly defaultNote?: string;
  readonly section?: string;
  readonly group?: string;
}

type ValueOf<T, S> = S extends { default: T } | { required: true } ? T : T | undefined;

/** Thrown by `read`: what a value should have been ("a whole number of at least 1"). */
export class Expected extends Error {}

function option<T, S extends OptionSpec<T>>(
  kind: Option<T>['kind'],
  spec: S,
  value: string,
  read: (text: string) => unknown,
  more: { choices?: readonly string[]; separator?: string; numbers?: NumberRange & { whole: boolean } } = {},
): Option<ValueOf<T, S>> {
  return {
    kind,
    help: spec.help,
    off: undefined,
    default: spec.default as ValueOf<T, S>,
    required: spec.required ?? false,
    short: spec.short,
    aliases: spec.aliases ?? [],
    value: spec.value ?? value,
    choices: more.choices,
    numbers: more.numbers,
    defaultNote: spec.defaultNote,
    section: spec.section,
    group: spec.group,
    separator: more.separator,
    read,
  };
}

type FlagSpec = OptionSpec<boolean> & ({ readonly default?: false } | { readonly default: true; readonly off: string });

/** On or off: `--overwrite`, `--no-overwrite`. One that is on by default says what turning it off does. */
export const flag = (spec: FlagSpec): Option<boolean> => ({
  ...option<boolean, OptionSpec<boolean>>('flag', spec, '', readFlag),
  default: spec.default ?? false,
  off: spec.default ? spec.off : undefined,
});

const truth: Readonly<Record<string, boolean>> = {
  true: true, yes: true, on: true, 1: true, false: false, no: false, off: false, 0: false,
}; // prettier-ignore
function readFlag(text: string): boolean {
  const value = truth[text.toLowerCase()];
  if (value === undefined) throw new Expected('true or false');
  return value;
}

/** Any text that is not empty: names, paths, prompts. */
export const text = <const S extends OptionSpec<string>>(spec: S): Option<ValueOf<string, S>> =>
  option<string, S>('value', spec, 'text', readText);

function readText(given: string): string {
  if (given === '') throw new Expected('a value that is not empty');
  return given;
}

interface NumberRange {
  readonly min?: number;
  readonly max?: number;
}

export interface NumberSpec extends OptionSpec<number>, NumberRange {}

/** A whole number within [min, max]. */
export const integer = <const S extends NumberSpec>(spec: S): Option<ValueOf<number, S>> =>
  option<number, S>('value', spec, 'n', (given) => {
    const value = Number(given);
    if (!/^[+-]?\d+$/.test(given) || !Number.isSafeInteger(value) || !within(value, spec)) {
      throw new Expected(`a whole number${range(spec)}`);
    }
    return value;
  }, { numbers: { ...limits(spec), whole: true } }); // prettier-ignore

/** A finite number within [min, max]. */
export const number = <const S extends NumberSpec>(spec: S): Option<ValueOf<number, S>> =>
  option<number, S>('value', spec, 'x', (given) => {
    const value = Number(given);
    if (given.trim() === '' || !Number.isFinite(value) || !within(value, spec)) {
      throw new Expected(`a number${range(spec)}`);
    }
    return value;
  }, { numbers: { ...limits(spec), whole: false } }); // prettier-ignore

const within = (value: number, { min = -Infinity, max = Infinity }: NumberRange): boolean =>
  value >= min && value <= max;

const limits = ({ min, max }: NumberRange): NumberRange => ({ ...(min !== undefined && { min }), ...(max !== undefined && { max }) }); // prettier-ignore

function range({ min, max }: NumberRange): string {
  if (min !== undefined && max !== undefined) return ` from ${min} to ${max}`;
  if (min !== undefined) return ` of at least ${min}`;
  return max !== undefined ? ` of at most ${max}` : '';
}

/** A number of bytes: `5GB` (powers of ten), `512MiB` (powers of two), `4096`. */
export const byteSize = <const S extends OptionSpec<number>>(spec: S): Option<ValueOf<number, S>> => {
  const shown = spec.default === undefined ? {} : { defaultNote: sizeText(spec.default) };
  return option<number, S>('value', { ...shown, ...spec }, 'size', readBytes);
};

/** `5e9` -> `5GB`, as it can be typed. */
function sizeText(bytes: number): string {
  const unit = [3, 2, 1].find((power) => bytes % 1000 ** power === 0) ?? 0;
  return `${bytes / 1000 ** unit}${['', 'kB', 'MB', 'GB'][unit]}`;
}

export function readBytes(given: string): number {
  const match = /^(\d+(?:\.\d+)?)\s*([kmgtp]?)(i?)b?$/i.exec(given.trim());
  const bytes = match && Math.round(Number(match[1]) * (match[3] ? 1024 : 1000) ** ' kmgtp'.indexOf(match[2]!.toLowerCase() || ' ')); // prettier-ignore
  if (!match || (match[3] && !match[2]) || !Number.isSafeInteger(bytes) || bytes! <= 0) {
    throw new Expected('a size such as 5GB, 512MiB or 4096 (bytes)');
  }
  return bytes!;
}

/** One of a few names. */
export const choice = <const C extends readonly string[], const S extends OptionSpec<C[number]>>(
  choices: C,
  spec: S,
): Option<ValueOf<C[number], S>> =>
  option<C[number], S>('value', spec, choices.join('|'), (given) => {
    if (!choices.includes(given)) throw new Expected(oneOf(choices));
    return given;
  }, { choices }); // prettier-ignore

export const oneOf = (names: readonly string[]): string =>
  names.length < 2 ? names.join() : `${names.slice(0, -1).join(', ')} or ${names.at(-1)}`;

/** A flag that may be repeated; in a config file a list. With a separator, `a,b` is two items too. */
export const list = <
  const S extends OptionSpec<readonly string[]> & { separator?: string; choices?: readonly string[] },
>(
  spec: S,
): Option<readonly string[]> => {
  const { separator, choices } = spec;
  const made = option<readonly string[], S>(
    'list',
    spec,
    'text',
    (given) => {
      if (choices && !choices.includes(given)) throw new Expected(oneOf(choices));
      return readText(given);
    },
    { ...(separator !== undefined && { separator }), ...(choices && { choices }) },
  );
  return { ...made, default: spec.default ?? [] };
};

/** A value with a form of its own; `read` throws `Expected` for what it does not take. The value must fit in JSON. */
export const custom = <T, const S extends OptionSpec<T> = OptionSpec<T>>(
  spec: S,
  value: string,
  read: (text: string) => T,
): Option<ValueOf<T, S>> => option<T, S>('value', spec, value, read);

/** `groupSize` -> `group-size`. */
export const flagName = (key: string): string => key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`);
/** An option as somebody would type it: a flag that is on by default is there to be turned off. */
export const asTyped = (
  key: string,
  { off, help }: Option<unknown>,
): { readonly name: string; readonly help: string } =>
  off === undefined ? { name: flagName(key), help } : { name: `no-${flagName(key)}`, help: off };
/** `groupSize` -> `DEEPSEEK_CONVERT_GROUP_SIZE`. */
export const environmentName = (key: string): string =>
  `DEEPSEEK_CONVERT_${flagName(key).replaceAll('-', '_').toUpperCase()}`;

/** Where a value came from, in words for error messages and for provenance. */
export interface Given {
  readonly from: 'command line' | 'environment' | 'config file';
  /** `--group-size`, `DEEPSEEK_CONVERT_GROUP_SIZE`, `quantize.group-size in job.yaml`. */
  readonly name: string;
  readonly raw: string | readonly string[] | boolean;
}

export interface Resolved {
  readonly values: Readonly<Record<string, unknown>>;
  /** Only what was given; all else is default. */
  readonly from: Readonly<Record<string, Given['from']>>;
}

/**
 * Each option's value from the first source that gives it; `sources` stand in order of precedence and map keys of the
 * table to what was given. Errors: usage, naming the source, what was given and what was expected.
 */
export function resolveOptions(table: OptionTable, sources: readonly ReadonlyMap<string, Given>[]): Resolved {
  const values: Record<string, unknown> = {};
  const from: Record<string, Given['from']> = {};
  for (const [key, spec] of Object.entries(table)) {
    const given = sources.map((source) => source.get(key)).find((g) => g !== undefined);
    if (given === undefined) {
      if (spec.required) throw missing(key, spec);
      values[key] = spec.default;
      continue;
    }
    values[key] = readGiven(spec, given);
    from[key] = given.from;
  }
  return Object.freeze({ values: Object.freeze(values), from: Object.freeze(from) });
}

/** The value of what was given, checked. Errors: usage, naming the source. */
export function readGiven(spec: Option<unknown>, given: Given): unknown {
  const { raw } = given;
  if (spec.kind === 'list') {
    if (typeof raw === 'boolean') throw invalid(spec, given, String(raw), 'a list');
    const parts = typeof raw === 'string' ? [raw] : raw;
    const items = spec.separator === undefined ? parts : parts.flatMap((part) => part.split(spec.separator!));
    return Object.freeze(items.map((item) => readOne(spec, given, item.trim())));
  }
  if (typeof raw !== 'string' && typeof raw !== 'boolean') throw invalid(spec, given, raw.join(', '), 'one value');
  return readOne(spec, given, String(raw));
}

function readOne(spec: Option<unknown>, given: Given, textValue: string): unknown {
  try {
    return spec.read(textValue);
  } catch (error) {
    if (error instanceof Expected) throw invalid(spec, given, textValue, error.message);
    throw error;
  }
}

function invalid(spec: Option<unknown>, given: Given, got: string, expected: string) {
  const near = spec.choices && didYouMean(got, spec.choices);
  return badUsage(`Invalid value for ${given.name}`, {
    expected,
    got: `"${got}"`,
    ...(near !== undefined && { hint: `Did you mean ${near}?` }),
  });
}

function missing(key: string, spec: Option<unknown>) {
  const name = spec.short === undefined ? `--${flagName(key)}` : `-${spec.short} (--${flagName(key)})`;
  return badUsage(`${name} <${spec.value}> is missing`, { hint: spec.help });
}

/** Options whose names would clash in one command are a mistake of ours. */
export function mergeTables(...tables: readonly OptionTable[]): OptionTable {
  const merged: Record<string, Option<unknown>> = {};
  for (const [key, spec] of tables.flatMap((table) => Object.entries(table))) {
    if (key in merged) throw bug(`option ${key} defined twice`);
    merged[key] = spec;
  }
  return merged;
}

/** What the environment gives for `table`. An empty variable counts as not set. */
export function fromEnvironment(table: OptionTable, environment: NodeJS.ProcessEnv): Map<string, Given> {
  const given = new Map<string, Given>();
  for (const [key, spec] of Object.entries(table)) {
    for (const name of [key, ...spec.aliases].map(environmentName)) {
      const raw = environment[name];
      if (raw === undefined || raw === '' || given.has(key)) continue;
      given.set(key, { from: 'environment', name, raw });
    }
  }
  return given;
}
