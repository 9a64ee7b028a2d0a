import { resolve } from 'node:path';
import { fromConfigFile, readConfigFile } from '../base/config.js';
import { ConvertError, badUsage, didYouMean } from '../base/errors.js';
import { flagName, fromEnvironment, mergeTables, resolveOptions } from '../base/options.js';
import { checkOutputs, settleNeeds } from './graph.js';
import { readKubernetes } from './kubernetes-options.js';
import { readSlurm } from './slurm-options.js';
import { substitute } from './substitute.js';
import type { Job, JobCommand, JobCommands } from './types.js';

/** Keys of a job that are no options of its command. */
export const jobKeys = ['name', 'command', 'needs', 'retries', 'shards', 'slurm', 'kubernetes'] as const;
export const fileKeys = ['version', 'defaults', 'matrix', 'jobs'] as const;
export const matrixKeys = ['models', 'recipes', 'exclude'] as const;
/** Names of jobs are names of files in the work folder. */
export const namePattern = '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$';

type Mapping = Readonly<Record<string, unknown>>;

/** A job as the file has it: where, its own keys, and what stands in for keys that it lacks, nearest first. */
interface Draft {
  readonly where: string;
  readonly body: Mapping;
  readonly behind: readonly { readonly where: string; readonly values: Mapping }[];
  readonly own: ReadonlyMap<string, string>;
}

export interface JobFileOptions {
  readonly commands: JobCommands;
  readonly environment: NodeJS.ProcessEnv;
  /** Everything that jobs write must lie below this folder. */
  readonly outputRoot: string;
  /** Folder of the batch itself, where no job may write. */
  readonly workFolder: string;
}

/**
 * Reads a file of jobs and checks all of it before anything starts: keys, values, names, needs, outputs. Jobs come
 * back in an order in which each stands after those that it needs. Errors: usage, one that lists every problem.
 */
export async function readJobs(path: string, options: JobFileOptions): Promise<Job[]> {
  const { entries } = await readConfigFile(path);
  const problems: ConvertError[] = [];
  const attempt = <T>(work: () => T): T | undefined => {
    try {
      return work();
    } catch (error) {
      if (!(error instanceof ConvertError) || error.kind === 'internal') throw error;
      // What is wrong with defaults is wrong with each job: once is enough.
      if (!problems.some(({ message }) => message === error.message)) problems.push(error);
      return undefined;
    }
  };
  attempt(() => checkKeys(entries, fileKeys, path));
  if (entries.version !== undefined && Number(entries.version) !== 1) {
    problems.push(badUsage('This version of job files is not known', { where: `version in ${path}`, expected: '1' }));
  }
  const drafts = attempt(() => draftsOf(entries, options, path)) ?? [];
  attempt(() => checkDefaults(entries.defaults, options.commands, `defaults in ${path}`));
  const jobs = drafts.flatMap((draft) => attempt(() => jobOf(draft, options)) ?? []);
  if (problems.length === 0 && jobs.length === 0) {
    problems.push(badUsage('The file has no jobs', { where: path, expected: 'a list under jobs:, or a matrix: of models and recipes' })); // prettier-ignore
  }
  const ordered = problems.length > 0 ? jobs : settleNeeds(jobs, problems, path);
  for (const problem of await checkOutputs(jobs, options)) problems.push(problem);
  if (problems.length === 1) throw problems[0]!;
  if (problems.length > 1) {
    const shown = problems.slice(0, 20).map(({ message }, i) => `\n${i + 1}. ${message}`);
    const more = problems.length > 20 ? `\nand ${problems.length - 20} more` : '';
    throw badUsage(`${path} has ${problems.length} problems; nothing was started:${shown.join('')}${more}`);
  }
  return ordered;
}

function draftsOf(entries: Mapping, options: JobFileOptions, path: string): Draft[] {
  const defaults = entries.defaults === undefined ? {} : mapping(entries.defaults, `defaults in ${path}`);
  const behind = [{ where: `defaults in ${path}`, values: defaults }];
  const list = entries.jobs ?? [];
  if (!Array.isArray(list)) throw badUsage('jobs must be a list', { where: path, got: typeof list });
  const single = list.map((body: unknown, i): Draft => {
    const where = `jobs[${i}] in ${path}`;
    return { where, body: mapping(body, where), behind, own: new Map() };
  });
  return [...(entries.matrix === undefined ? [] : matrixDrafts(entries.matrix, behind, options, path)), ...single];
}

function matrixDrafts(value: unknown, behind: Draft['behind'], options: JobFileOptions, path: string): Draft[] {
  const where = `matrix in ${path}`;
  const matrix = mapping(value, where);
  checkKeys(matrix, matrixKeys, where);
  const models = mapping(matrix.models, `matrix.models in ${path}`);
  const recipes = mapping(matrix.recipes, `matrix.recipes in ${path}`);
  const leftOut = excluded(matrix.exclude, Object.keys(models), Object.keys(recipes), `matrix.exclude in ${path}`);
  return Object.entries(models).flatMap(([model, given]) =>
    Object.entries(recipes).flatMap(([recipe, body]): Draft[] => {
      if (leftOut(model, recipe)) return [];
      const at = `matrix.recipes.${recipe} in ${path}`;
      const modelAt = `matrix.models.${model} in ${path}`;
      const values = typeof given === 'string' ? { input: given } : mapping(given, modelAt);
      checkAnyCommand(values, options.commands, modelAt);
      const input = substitute(values.input, new Map([['model', model]]), options.environment, `${modelAt}.input`);
      const own = new Map([['model', model], ['recipe', recipe]]); // prettier-ignore
      if (typeof input === 'string') own.set('input', input);
      const named = { name: `${model}-${recipe}`, ...mapping(body, at) };
      return [{ where: at, body: named, behind: [{ where: modelAt, values }, ...behind], own }];
    }),
  );
}

function excluded(value: unknown, models: string[], recipes: string[], where: string) {
  if (value !== undefined && !Array.isArray(value)) throw badUsage('exclude must be a list', { where });
  const rules = (value ?? []).map((rule: unknown, i: number) => {
    const at = `[${i}] of ${where}`;
    const given = mapping(rule, at);
    checkKeys(given, ['model', 'recipe'], at);
    const { model, recipe } = given;
    if (model === undefined && recipe === undefined) throw badUsage('Expected a model, a recipe or both', { where: at }); // prettier-ignore
    for (const [name, known] of [[model as string | undefined, models], [recipe as string | undefined, recipes]] as const) {
      if (name !== undefined && !known.includes(name)) throw unknownName(name, known, at);
    } // prettier-ignore
    return given;
  });
  return (model: string, recipe: string): boolean =>
    rules.some((rule) => (rule.model ?? model) === model && (rule.recipe ?? recipe) === recipe);
}

function jobOf(draft: Draft, { commands, environment }: JobFileOptions): Job {
  const text = (key: string, from: Mapping, where: string, own: ReadonlyMap<string, string>): string | undefined => {
    if (from[key] === undefined) return undefined;
    const value = substitute(from[key], own, environment, `${key} of ${where}`);
    if (typeof value !== 'string' || value === '') throw badUsage(`${key} must be a text`, { where });
    return value;
  };
  const name = text('name', draft.body, draft.where, draft.own);
  if (name === undefined) throw badUsage('The job has no name', { where: draft.where, hint: 'Add  name: int4' });
  if (!new RegExp(namePattern).test(name)) {
    throw badUsage('A job needs another name', { where: draft.where, got: `"${name}"`, expected: 'letters, digits, ".", "_" and "-", a letter or digit first' }); // prettier-ignore
  }
  const where = `${name}, ${draft.where}`;
  const own = new Map([...draft.own, ['name', name]]);
  const levels = [{ where: draft.where, values: draft.body }, ...draft.behind];
  const commandName = levels.map((level) => text('command', level.values, level.where, own)).find((c) => c !== undefined); // prettier-ignore
  if (commandName === undefined) throw badUsage('The job has no command', { where, expected: Object.keys(commands).join(', ') }); // prettier-ignore
  const command = Object.hasOwn(commands, commandName) ? commands[commandName] : undefined;
  if (command === undefined) throw unknownName(commandName, Object.keys(commands), where, 'command');

  const table = mergeTables(command.arguments, command.options);
  const inFile = new Map(
    levels.toReversed().flatMap((level, i) => {
      const isOwn = i === levels.length - 1;
      const values = substitute(optionsOf(level.values, command, isOwn, commands), own, environment, level.where);
      const path = isOwn ? where : level.where;
      return [...fromConfigFile({ path, entries: values as Mapping }, commandName, Object.keys(commands), table)];
    }),
  );
  const given: Job['given'] = new Map([...fromEnvironment(table, environment), ...inFile]);
  const { values } = resolveOptions(table, [given]);
  const needs = substitute(draft.body.needs ?? [], own, environment, `needs of ${where}`);
  const sections = (key: 'slurm' | 'kubernetes') => levels.toReversed().map(({ where, values }) => ({ where, value: substitute(values[key], own, environment, `${key} of ${where}`) })); // prettier-ignore
  const writes = command.writes.flatMap((key) => (typeof values[key] === 'string' ? [resolve(values[key])] : []));
  const reads = Object.keys(command.arguments).flatMap((key) => values[key] as string | readonly string[]);
  return {
    name,
    command: commandName,
    needs: namesOf(needs, where),
    retries: levels.map(({ values }) => retriesOf(values.retries, where)).find((n) => n !== undefined),
    given,
    values,
    writes,
    out: 'out' in table && typeof values.out === 'string' ? resolve(values.out) : undefined,
    reads: reads.map((path) => resolve(path)),
    shards: shardsOf(substitute(draft.body.shards, own, environment, `shards of ${where}`), command, commandName, where), // prettier-ignore
    slurm: readSlurm(sections('slurm')),
    kubernetes: readKubernetes(sections('kubernetes')),
  };
}

/**
 * What one level says of options. Keys of the job itself all count (an unknown one is an error); of defaults and
 * models, those that its command has.
 */
function optionsOf(values: Mapping, command: JobCommand, isOwn: boolean, commands: JobCommands): Mapping {
  const known = keysOf(command);
  const groups = new Set(Object.values(command.options).flatMap(({ group }) => group ?? []));
  return Object.fromEntries(
    Object.entries(values).filter(([key]) => {
      if ((jobKeys as readonly string[]).includes(key)) return false;
      return isOwn || known.has(canonical(key)) || groups.has(key) || key in commands;
    }),
  );
}

const canonical = (key: string): string => flagName(key).replaceAll('_', '-');

function keysOf(command: JobCommand): Set<string> {
  const all = Object.entries({ ...command.arguments, ...command.options });
  return new Set(all.flatMap(([key, { aliases }]) => [flagName(key), ...aliases]));
}

function checkDefaults(value: unknown, commands: JobCommands, where: string): void {
  if (value === undefined) return;
  const { name, needs, ...rest } = mapping(value, where);
  if (name !== undefined || needs !== undefined) {
    throw badUsage(`${name === undefined ? 'needs' : 'name'} has no place in defaults`, { where });
  }
  checkAnyCommand(rest, commands, where);
}

/** A key that no command has is a typing error, also where it is only a default. */
function checkAnyCommand(values: Mapping, commands: JobCommands, where: string): void {
  const tables = Object.values(commands);
  const known = new Set<string>([
    ...jobKeys.filter((key) => !['name', 'needs', 'shards'].includes(key)),
    ...Object.keys(commands),
    ...tables.flatMap((command) => [...keysOf(command)]),
    ...tables.flatMap(({ options }) => Object.values(options).flatMap(({ group }) => group ?? [])),
  ]);
  for (const key of Object.keys(values)) {
    if (!known.has(key) && !known.has(canonical(key))) throw unknownName(key, [...known], where, 'option');
  }
  for (const [name, command] of Object.entries(commands)) {
    if (values[name] === undefined) continue;
    const known = [...keysOf(command), ...Object.values(command.options).flatMap(({ group }) => group ?? [])];
    checkKeys(mapping(values[name], `${name}: of ${where}`), known, `${name}: of ${where}`, canonical);
  }
}

function retriesOf(value: unknown, where: string): number | undefined {
  if (value === undefined) return undefined;
  const retries = Number(value);
  if (!Number.isInteger(retries) || retries < 0 || retries > 100) {
    throw badUsage('Invalid value for retries', { where, got: JSON.stringify(value, bigintAsText), expected: 'a whole number from 0 to 100' }); // prettier-ignore
  }
  return retries;
}

function shardsOf(value: unknown, { inShards }: JobCommand, command: string, where: string): number | undefined {
  if (value === undefined) return undefined;
  if (!inShards) throw badUsage(`${command} cannot be done in shards`, { where, got: 'shards' });
  const shards = Number(value);
  if (Number.isInteger(shards) && shards >= 1 && shards <= 100_000) return shards;
  throw badUsage('Invalid value for shards', { where, got: JSON.stringify(value, bigintAsText), expected: 'a whole number from 1 to 100000' }); // prettier-ignore
}

function namesOf(value: unknown, where: string): string[] {
  const list = typeof value === 'string' ? [value] : value;
  if (!Array.isArray(list) || list.some((item) => typeof item !== 'string')) {
    throw badUsage('needs must be a list of names of jobs', { where });
  }
  return list as string[];
}

function mapping(value: unknown, where: string): Mapping {
  if (typeof value !== 'object' || value === null || Array.isArray(value)) {
    throw badUsage('Expected a mapping of names to values', { where, got: value === undefined ? 'nothing' : JSON.stringify(value, bigintAsText).slice(0, 60) }); // prettier-ignore
  }
  return value as Mapping;
}

const bigintAsText = (_: string, value: unknown): unknown => (typeof value === 'bigint' ? String(value) : value);

function checkKeys(
  values: Mapping,
  known: readonly string[],
  where: string,
  read = (key: string): string => key,
): void {
  // prettier-ignore
  for (const key of Object.keys(values)) if (!known.includes(read(key))) throw unknownName(key, known, where);
}

function unknownName(got: string, known: readonly string[], where: string, what = 'key') {
  const near = didYouMean(got, known);
  const hint = near !== undefined ? `Did you mean ${near}?` : known.length <= 12 ? `Known: ${known.join(', ')}.` : undefined; // prettier-ignore
  return badUsage(`Unknown ${what} "${got}"`, { where, ...(hint !== undefined && { hint }) });
}
