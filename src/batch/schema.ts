import { flagName, type Option, type OptionTable } from '../base/options.js';
import { type JobCommand, type JobCommands } from './types.js';
import { namePattern } from './file.js';
import { kubernetesSchemas } from './kubernetes-options.js';
import { slurmSchemas } from './slurm-options.js';

type Schema = Readonly<Record<string, unknown>>;

/** Where a placeholder stands, the value is known only on the machine that runs the jobs. */
const filled = { type: 'string', pattern: '\\$\\{' };
const clusters = { slurm: { $ref: '#/$defs/slurm' }, kubernetes: { $ref: '#/$defs/kubernetes' } };
const shards = { description: 'Divides the job: plan, so many workers side by side, merge.', anyOf: [{ type: 'integer', minimum: 1, maximum: 100_000 }, filled] }; // prettier-ignore
const retries = { description: 'How often a job that crashed or lacked resources is tried again.', type: 'integer', minimum: 0, maximum: 100 }; // prettier-ignore

/**
 * The published schema of job files (schemas/batch.v1.schema.json), made from the option tables: editors complete and
 * check with it. What only the whole file shows (needs, outputs in each other's way) is left to the program.
 */
export function jobFileSchema(commands: JobCommands): Schema {
  const names = Object.keys(commands);
  const pool = new Pool();
  const own = Object.fromEntries(names.map((name) => [name, properties(commands[name]!, pool)]));
  const forms = new Map<string, Map<string, Schema>>();
  for (const [key, schema] of Object.values(own).flatMap((table) => Object.entries(table))) {
    forms.set(key, (forms.get(key) ?? new Map<string, Schema>()).set(JSON.stringify(schema), schema));
  }
  // As a default, a name that two commands understand differently may be either.
  const any = Object.fromEntries([...forms].map(([key, found]) => [key, found.size === 1 ? [...found.values()][0] : { anyOf: [...found.values()] }])); // prettier-ignore
  const sections = Object.fromEntries(names.map((name) => [name, { $ref: `#/$defs/${name}-section` }]));
  const common = {
    name: { description: 'Name of the job; ${model}-${recipe} in a matrix.', anyOf: [{ type: 'string', pattern: namePattern }, filled] },
    needs: { description: 'Jobs that must be done before.', anyOf: [{ type: 'string' }, { type: 'array', items: { type: 'string' } }] },
    retries,
    ...clusters,
  }; // prettier-ignore
  const command = { description: 'What the job runs.', anyOf: [{ enum: names }, filled] };
  const jobWith = (required: readonly string[]) => ({
    anyOf: [
      ...names.map((name) => closed({ ...sections, ...own[name]!, ...common, ...(commands[name]!.inShards && { shards }), command: { const: name } }, ['command', ...required])),
      // From the defaults, or from a placeholder: any command's options may be meant.
      closed({ ...sections, ...any, ...common, shards, command: filled }, required),
    ],
  }); // prettier-ignore
  const defaults = closed({ ...sections, ...any, command, retries, ...clusters });
  const exclude = { type: 'array', items: closed({ model: { type: 'string' }, recipe: { type: 'string' } }) };
  const models = { type: 'object', additionalProperties: { anyOf: [{ type: 'string' }, { $ref: '#/$defs/defaults' }] } }; // prettier-ignore
  const recipes = { type: 'object', additionalProperties: { $ref: '#/$defs/recipe' } };
  return {
    $schema: 'https://json-schema.org/draft/2020-12/schema',
    $id: 'deepseek-convert/batch/1',
    title: 'Jobs of deepseek-convert batch, version 1',
    description: 'The program also takes keys in snake and camel case. ${NAME} and ${NAME:-default} are filled from the environment.', // prettier-ignore
    ...closed({
      version: { const: 1 },
      defaults: { $ref: '#/$defs/defaults', description: 'Values for all jobs whose command has the option.' },
      matrix: { description: 'Each model with each recipe.', ...closed({ models, recipes, exclude }, ['models', 'recipes']) }, // prettier-ignore
      jobs: { type: 'array', items: { $ref: '#/$defs/job' } },
    }),
    $defs: {
      job: jobWith(['name']),
      recipe: jobWith([]),
      defaults,
      ...slurmSchemas(filled),
      ...kubernetesSchemas(filled),
      ...Object.fromEntries(names.map((name) => [`${name}-section`, closed(own[name]!)])),
      ...pool.definitions(),
    },
  };
}

const closed = (values: Schema, required: readonly string[] = []): Schema => ({
  type: 'object',
  properties: values,
  additionalProperties: false,
  ...(required.length > 0 && { required }),
});

/** Options that several commands share are written once. */
class Pool {
  readonly #names = new Map<string, string>();

  take(key: string, schema: Schema): Schema {
    const text = JSON.stringify(schema);
    let name = this.#names.get(text);
    if (name === undefined) {
      const taken = new Set(this.#names.values());
      for (let i = 1; name === undefined || taken.has(name); i++) name = i === 1 ? `option-${key}` : `option-${key}-${i}`; // prettier-ignore
      this.#names.set(text, name);
    }
    return { $ref: `#/$defs/${name}` };
  }

  definitions = (): Schema => Object.fromEntries([...this.#names].map(([text, name]) => [name, JSON.parse(text) as Schema])); // prettier-ignore
}

function properties(command: JobCommand, pool: Pool): Record<string, Schema> {
  const found: Record<string, Schema> = {};
  const groups: Record<string, Record<string, Schema>> = {};
  for (const [key, option] of Object.entries({ ...command.arguments, ...command.options } as OptionTable)) {
    const name = flagName(key);
    found[name] = pool.take(name, { description: option.help, ...valueOf(option) });
    if (option.group !== undefined) (groups[option.group] ??= {})[name] = found[name];
  }
  for (const [group, members] of Object.entries(groups)) found[group] = pool.take(group, closed(members));
  return found;
}

function valueOf({ kind, choices, numbers, separator }: Option<unknown>): Schema {
  if (kind === 'flag') return { anyOf: [{ type: 'boolean' }, { enum: ['true', 'yes', 'on', 'false', 'no', 'off'] }, filled] }; // prettier-ignore
  const one = oneValue(choices, numbers);
  if (kind !== 'list') return one;
  const joined = separator === undefined ? [] : [{ type: 'string' }];
  return { anyOf: [{ type: 'array', items: one }, one, ...joined] };
}

function oneValue(choices: Option<unknown>['choices'], numbers: Option<unknown>['numbers']): Schema {
  if (choices) return { anyOf: [{ enum: choices }, filled] };
  if (!numbers) return { type: ['string', 'number', 'boolean'] };
  const { min, max, whole } = numbers;
  const range = { ...(min !== undefined && { minimum: min }), ...(max !== undefined && { maximum: max }) };
  return { anyOf: [{ type: whole ? 'integer' : 'number', ...range }, filled] };
}
