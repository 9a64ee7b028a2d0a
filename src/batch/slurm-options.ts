import { badUsage, didYouMean } from '../base/errors.js';

/** What a job asks of Slurm: options of sbatch by their keys in the job file, each checked. */
export interface SlurmOptions extends SlurmRequest {
  /** What single stages of a job in shards ask for instead: merge needs no GPU. */
  readonly stages: Readonly<Partial<Record<ShardStage, SlurmRequest>>>;
}

export interface SlurmRequest {
  /** Arguments of sbatch by their names, without dashes; true for those that take no value. */
  readonly options: Readonly<Record<string, string | true>>;
  /** Seconds before the time limit at which a worker is told to stop after its block. */
  readonly grace: number | undefined;
}

/** What becomes of a job with `shards`: one Slurm job, an array of them, one that waits for all. */
export const shardStages = ['plan', 'worker', 'merge'] as const;
export type ShardStage = (typeof shardStages)[number];

interface Key {
  /** The option of sbatch; undefined for what is ours. */
  readonly flag?: string;
  readonly help: string;
  readonly pattern: string;
  readonly expected: string;
}

const word = '[A-Za-z0-9_][A-Za-z0-9_.@+-]*';
const words = `^${word}(,${word})*$`;
const whole = '^[1-9][0-9]{0,5}$';
const memory = '^[1-9][0-9]{0,8}[KMGTkmgt]?$';
const time = '^([0-9]+|[0-9]+:[0-9]{2}(:[0-9]{2})?|[0-9]+-[0-9]+(:[0-9]{2}){0,2})$';
const gres = `^${word}(:${word}){0,2}(,${word}(:${word}){0,2})*$`;
const features = '^[A-Za-z0-9_.,&|()[\\]*:+-]{1,200}$';
const nodes = '^[A-Za-z0-9_.,[\\]-]{1,500}$';

/**
 * Keys of a `slurm:` section. Values go to sbatch as arguments and into its scripts, so each has a pattern that leaves
 * no room for blanks, quotes or line ends.
 */
const keys: Readonly<Record<string, Key>> = {
  partition: { flag: 'partition', help: 'Partition, or several: gpu,long.', pattern: words, expected: 'names of partitions' },
  account: { flag: 'account', help: 'Account that pays.', pattern: `^${word}$`, expected: 'a name' },
  qos: { flag: 'qos', help: 'Quality of service.', pattern: `^${word}$`, expected: 'a name' },
  gres: { flag: 'gres', help: 'Generic resources: gpu:1, gpu:a100:2; none.', pattern: gres, expected: 'resources such as gpu:1 or gpu:a100:2' },
  time: { flag: 'time', help: 'Time limit as Slurm has it: minutes, hours:minutes:seconds, days-hours. A worker that meets it goes on in the queue.', pattern: time, expected: 'minutes, H:MM:SS or D-H' },
  cpus: { flag: 'cpus-per-task', help: 'CPUs; also the threads of jobs that name none.', pattern: whole, expected: 'a whole number of at least 1' },
  memory: { flag: 'mem', help: 'Memory: 64G. Without a letter MiB.', pattern: memory, expected: 'a whole number with K, M, G or T' },
  constraint: { flag: 'constraint', help: 'Features that a node must have: a100|h100.', pattern: features, expected: 'names of features with & and |' },
  grace: { help: 'Seconds before the time limit at which a worker stops after its block; 120.', pattern: whole, expected: 'a whole number of seconds' },
}; // prettier-ignore

/**
 * What `extra` may have. Options of sbatch that write files, change the environment or the program, or with which the
 * batch works itself are not among them: a job file of somebody else runs nothing but this program.
 */
const extras: Readonly<Record<string, string | null>> = {
  begin: '^[A-Za-z0-9:+-]{1,40}$',
  comment: '^[A-Za-z0-9 _.,:@+-]{1,200}$',
  'cores-per-socket': whole,
  'cpus-per-gpu': whole,
  deadline: '^[A-Za-z0-9:+-]{1,40}$',
  exclude: nodes,
  exclusive: null,
  gpus: `^${word}(:${word})?$`,
  'gpus-per-node': `^${word}(:${word})?$`,
  'gpu-bind': '^[a-z0-9_:,*+-]{1,100}$',
  hint: '^[a-z_]{1,20}$',
  licenses: '^[A-Za-z0-9_.@:,+-]{1,200}$',
  'mail-type': '^[A-Z0-9_,]{1,200}$',
  'mail-user': '^[A-Za-z0-9_.+-]+@[A-Za-z0-9.-]+$',
  'mem-per-cpu': memory,
  'mem-per-gpu': memory,
  mincpus: whole,
  nice: '^-?[0-9]{1,10}$',
  nodelist: nodes,
  oversubscribe: null,
  prefer: features,
  priority: '^[0-9]{1,10}$',
  reservation: words,
  'sockets-per-node': whole,
  switches: '^[0-9]{1,6}(@[0-9:-]{1,20})?$',
  'thread-spec': whole,
  'threads-per-core': whole,
  tmp: memory,
  wckey: `^${word}$`,
};

type Mapping = Readonly<Record<string, unknown>>;

/**
 * Reads `slurm:` sections, the farthest first; nearer ones win key by key. Errors: usage, for keys and values that are
 * not known or not allowed.
 */
export function readSlurm(levels: readonly { readonly where: string; readonly value: unknown }[]): SlurmOptions {
  let request: SlurmRequest = { options: {}, grace: undefined };
  const stages: Partial<Record<ShardStage, SlurmRequest>> = {};
  for (const { where, value } of levels) {
    if (value === undefined || value === null) continue;
    const at = `slurm of ${where}`;
    const section = mappingOf(value, at);
    const of = Object.fromEntries(Object.entries(section).filter(([key]) => !isStage(key)));
    request = over(request, readRequest(of, at, [...Object.keys(keys), 'extra', ...shardStages]));
    for (const stage of shardStages.filter((stage) => section[stage] !== undefined)) {
      const inner = `${stage} of ${at}`;
      const own = readRequest(mappingOf(section[stage], inner), inner, [...Object.keys(keys), 'extra']);
      stages[stage] = over(stages[stage] ?? { options: {}, grace: undefined }, own);
    }
  }
  return { ...request, stages };
}

const isStage = (key: string): boolean => (shardStages as readonly string[]).includes(key);

/** What a stage, or without one the whole job, asks for. */
export const requestOf = (slurm: SlurmOptions, stage?: ShardStage): SlurmRequest =>
  stage === undefined ? slurm : over(slurm, slurm.stages[stage] ?? { options: {}, grace: undefined });

const over = (far: SlurmRequest, near: SlurmRequest): SlurmRequest => ({
  options: { ...far.options, ...near.options },
  grace: near.grace ?? far.grace,
});

function readRequest(section: Mapping, where: string, known: readonly string[]): SlurmRequest {
  const options: Record<string, string | true> = {};
  let grace: number | undefined;
  for (const [key, value] of Object.entries(section)) {
    if (key === 'extra') {
      Object.assign(options, readExtra(value, `extra in ${where}`));
      continue;
    }
    const spec = Object.hasOwn(keys, key) ? keys[key] : undefined;
    if (spec === undefined) throw unknown('key', key, known, where);
    const given = checked(key, value, spec.pattern, spec.expected, where);
    if (spec.flag === undefined) grace = Number(given);
    else options[spec.flag] = given;
  }
  return { options, grace };
}

function readExtra(value: unknown, where: string): Record<string, string | true> {
  const list = Array.isArray(value) ? (value as unknown[]) : [value];
  return Object.fromEntries(
    list.map((item): [string, string | true] => {
      const [, name, given] = /^--([a-z-]+)(?:=([^]*))?$/.exec(typeof item === 'string' ? item : '') ?? [];
      if (name === undefined) {
        throw badUsage('An option of sbatch is not understood', { where, got: JSON.stringify(item)?.slice(0, 60) ?? 'nothing', expected: '--name=value' }); // prettier-ignore
      }
      const key = Object.entries(keys).find(([, { flag }]) => flag === name)?.[0];
      if (key !== undefined) throw badUsage(`--${name} has a key of its own`, { where, expected: `${key}: in the slurm section` }); // prettier-ignore
      const pattern = Object.hasOwn(extras, name) ? extras[name] : undefined;
      if (pattern === undefined) throw unknown('option of sbatch in a job file:', name, Object.keys(extras), where);
      if (pattern !== null) return [name, checked(`--${name}`, given, pattern, 'a value that sbatch knows', where)];
      if (given !== undefined) throw badUsage(`--${name} takes no value here`, { where, got: given.slice(0, 60) });
      return [name, true];
    }),
  );
}

function checked(key: string, value: unknown, pattern: string, expected: string, where: string): string {
  const text = ['string', 'number', 'bigint'].includes(typeof value) ? String(value) : undefined;
  if (text !== undefined && new RegExp(pattern).test(text)) return text;
  const got = text === undefined ? typeof value : JSON.stringify(text.slice(0, 60));
  throw badUsage(`Invalid value for ${key}`, { where, got, expected });
}

function mappingOf(value: unknown, where: string): Mapping {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Mapping;
  throw badUsage('Expected a mapping of names to values', { where, got: Array.isArray(value) ? 'a list' : typeof value }); // prettier-ignore
}

function unknown(what: string, got: string, known: readonly string[], where: string) {
  const near = didYouMean(got, known);
  return badUsage(`Unknown ${what} "${got}"`, { where, hint: near === undefined ? `Known: ${known.join(', ')}.` : `Did you mean ${near}?` }); // prettier-ignore
}

/** Definitions for the published schema of job files: `slurm`, the section, and `slurm-stage`, its inner ones. */
export function slurmSchemas(filled: object): Readonly<Record<string, object>> {
  const value = ({ help, pattern }: Key) => ({ description: help, anyOf: [{ type: 'string', pattern }, { type: 'integer' }, filled] }); // prettier-ignore
  const extra = { description: 'More options of sbatch, each as --name=value.', anyOf: [{ type: 'string' }, { type: 'array', items: { type: 'string' } }] }; // prettier-ignore
  const request = { ...Object.fromEntries(Object.entries(keys).map(([key, spec]) => [key, value(spec)])), extra };
  const closed = (description: string, properties: object) => ({ description, type: 'object', properties, additionalProperties: false }); // prettier-ignore
  const stages = Object.fromEntries(shardStages.map((stage) => [stage, { $ref: '#/$defs/slurm-stage' }]));
  return {
    slurm: closed('What jobs ask of Slurm (--executor slurm).', { ...request, ...stages }),
    'slurm-stage': closed('What one stage of a job in shards asks for instead.', request),
  };
}
