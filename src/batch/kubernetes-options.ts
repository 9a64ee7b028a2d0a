import { badUsage, didYouMean } from '../base/errors.js';
import { shardStages, type ShardStage } from './slurm-options.js';

/** What a pod of one stage asks for, as the job file has it; checked, and undefined where it says nothing. */
export interface PodRequest {
  readonly image?: string;
  readonly cpu?: string;
  readonly memory?: string;
  readonly gpus?: string;
  readonly grace?: string;
}

/** The `kubernetes:` section of a job. */
export interface KubernetesOptions extends PodRequest {
  readonly namespace?: string;
  readonly queue?: string;
  readonly folder?: string;
  readonly parallelism?: string;
  readonly user?: string;
  readonly 'pull-secret'?: string;
  /** Where each claim is mounted: `{ /work: models, /models: zoo:ro }`. */
  readonly volumes: Readonly<Record<string, string>>;
  readonly 'node-selector': Readonly<Record<string, string>>;
  readonly stages: Readonly<Partial<Record<ShardStage, PodRequest>>>;
}

interface Key {
  readonly help: string;
  readonly pattern: string;
  readonly expected: string;
}

const label = '[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?';
const quantity = '^[0-9]{1,9}(\\.[0-9]{1,3})?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$';
const whole = '^[0-9]{1,9}$';
const path = '^/[A-Za-z0-9._@/-]{0,200}$';

const ofPods: Readonly<Record<keyof PodRequest, Key>> = {
  image: { help: 'Image that has deepseek-convert on its PATH.', pattern: '^[a-z0-9][A-Za-z0-9._/:@-]{0,254}$', expected: 'the name of an image' },
  cpu: { help: 'CPUs, request and limit: 8; also the threads of jobs that name none.', pattern: quantity, expected: 'a quantity: 8, 500m' },
  memory: { help: 'Memory, request and limit: 64Gi.', pattern: quantity, expected: 'a quantity: 64Gi' },
  gpus: { help: 'GPUs of a pod (nvidia.com/gpu).', pattern: whole, expected: 'a whole number' },
  grace: { help: 'Seconds that a pod has for its block when it is told to stop; 300.', pattern: whole, expected: 'a whole number of seconds' },
}; // prettier-ignore

const ofJobs: Readonly<Record<Exclude<keyof KubernetesOptions, keyof PodRequest | 'volumes' | 'node-selector' | 'stages'>, Key>> = {
  namespace: { help: 'Namespace.', pattern: `^${label}$`, expected: 'a name of small letters, digits and dashes' },
  queue: { help: 'Kueue’s LocalQueue; Jobs wait in it until they are admitted.', pattern: `^${label}$`, expected: 'a name of small letters, digits and dashes' },
  folder: { help: 'Where relative paths begin in the pods; by default the first volume.', pattern: path, expected: 'an absolute path' },
  parallelism: { help: 'Shards at a time; by default all.', pattern: '^[1-9][0-9]{0,4}$', expected: 'a whole number of at least 1' },
  user: { help: 'User and group id of the pods, which own what they write.', pattern: whole, expected: 'a number' },
  'pull-secret': { help: 'Secret with which the image is pulled.', pattern: `^${label}$`, expected: 'a name of small letters, digits and dashes' },
}; // prettier-ignore

const maps = {
  volumes: {
    help: 'Claims (PersistentVolumeClaim) by the paths at which they are mounted: { /work: models, /zoo: zoo:ro }.',
    name: path,
    ...{ pattern: `^${label}(:ro)?$`, expected: 'the name of a claim; :ro after it to read only' },
  },
  'node-selector': {
    help: 'Labels that a node must have.',
    name: '^[A-Za-z0-9][A-Za-z0-9._/-]{0,200}$',
    ...{ pattern: '^[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?$', expected: 'the value of a label' },
  },
} as const;

type Mapping = Readonly<Record<string, unknown>>;

/** Reads `kubernetes:` sections, the farthest first; nearer ones win key by key. Errors: usage. */
export function readKubernetes(
  levels: readonly { readonly where: string; readonly value: unknown }[],
): KubernetesOptions {
  let found: KubernetesOptions = { volumes: {}, 'node-selector': {}, stages: {} };
  for (const { where, value } of levels) {
    if (value === undefined || value === null) continue;
    found = over(found, mappingOf(value, `kubernetes of ${where}`), `kubernetes of ${where}`);
  }
  return found;
}

/** What the pods of a stage, or without one of the whole job, ask for. */
export const podRequest = (options: KubernetesOptions, stage?: ShardStage): PodRequest =>
  stage === undefined ? options : { ...options, ...options.stages[stage] };

function over(far: KubernetesOptions, section: Mapping, where: string): KubernetesOptions {
  const known: Readonly<Record<string, Key>> = { ...ofJobs, ...ofPods };
  const near: Record<string, string> = {};
  const stages: Partial<Record<ShardStage, PodRequest>> = { ...far.stages };
  const mapped = { volumes: far.volumes, 'node-selector': far['node-selector'] };
  for (const [key, value] of Object.entries(section)) {
    if (key === 'volumes' || key === 'node-selector') {
      mapped[key] = { ...mapped[key], ...readMap(key, value, where) };
    } else if ((shardStages as readonly string[]).includes(key)) {
      const inner = readScalars(mappingOf(value, `${key} of ${where}`), ofPods, `${key} of ${where}`);
      stages[key as ShardStage] = { ...stages[key as ShardStage], ...inner };
    } else {
      if (!Object.hasOwn(known, key)) throw unknown(key, [...Object.keys(known), ...Object.keys(maps), ...shardStages], where); // prettier-ignore
      near[key] = checked(key, value, known[key]!, where);
    }
  }
  return { ...far, ...near, ...mapped, stages };
}

function readScalars(section: Mapping, known: Readonly<Record<string, Key>>, where: string): Record<string, string> {
  return Object.fromEntries(
    Object.entries(section).map(([key, value]) => {
      if (!Object.hasOwn(known, key)) throw unknown(key, Object.keys(known), where);
      return [key, checked(key, value, known[key]!, where)];
    }),
  );
}

function readMap(key: keyof typeof maps, value: unknown, where: string): Record<string, string> {
  const at = `${key} of ${where}`;
  return Object.fromEntries(
    Object.entries(mappingOf(value, at)).map(([name, item]) => {
      const isGood = new RegExp(maps[key].name).test(name) && !name.split('/').includes('..');
      if (!isGood)
        throw badUsage(`A name is not allowed in ${key}`, { where: at, got: JSON.stringify(name.slice(0, 60)) });
      return [name, checked(name, item, maps[key], at)];
    }),
  );
}

function checked(
  key: string,
  value: unknown,
  { pattern, expected }: Pick<Key, 'pattern' | 'expected'>,
  where: string,
): string {
  // prettier-ignore
  const text = ['string', 'number', 'bigint', 'boolean'].includes(typeof value) ? String(value) : undefined;
  if (text !== undefined && new RegExp(pattern).test(text)) return text;
  const got = text === undefined ? typeof value : JSON.stringify(text.slice(0, 60));
  throw badUsage(`Invalid value for ${key}`, { where, got, expected });
}

function mappingOf(value: unknown, where: string): Mapping {
  if (typeof value === 'object' && value !== null && !Array.isArray(value)) return value as Mapping;
  throw badUsage('Expected a mapping of names to values', { where, got: Array.isArray(value) ? 'a list' : typeof value }); // prettier-ignore
}

function unknown(got: string, known: readonly string[], where: string) {
  const near = didYouMean(got, known);
  return badUsage(`Unknown key "${got}"`, { where, hint: near === undefined ? `Known: ${known.join(', ')}.` : `Did you mean ${near}?` }); // prettier-ignore
}

/** Definitions for the published schema of job files: `kubernetes`, and `kubernetes-stage`, its inner sections. */
export function kubernetesSchemas(filled: object): Readonly<Record<string, object>> {
  const scalar = ({ help, pattern }: Key) => ({ description: help, anyOf: [{ type: 'string', pattern }, { type: 'number' }, filled] }); // prettier-ignore
  const scalars = (table: Readonly<Record<string, Key>>) => Object.fromEntries(Object.entries(table).map(([key, spec]) => [key, scalar(spec)])); // prettier-ignore
  const mapped = Object.fromEntries(
    Object.entries(maps).map(([key, { help, name, pattern }]) => {
      const value = { anyOf: [{ type: 'string', pattern }, { type: ['number', 'boolean'] }, filled] };
      return [
        key,
        { description: help, type: 'object', propertyNames: { pattern: name }, additionalProperties: value },
      ];
    }),
  );
  const closed = (description: string, properties: object) => ({ description, type: 'object', properties, additionalProperties: false }); // prettier-ignore
  const stages = Object.fromEntries(shardStages.map((stage) => [stage, { $ref: '#/$defs/kubernetes-stage' }]));
  return {
    kubernetes: closed('What the pods of jobs get (--emit k8s).', { ...scalars(ofJobs), ...scalars(ofPods), ...mapped, ...stages }),
    'kubernetes-stage': closed('What the pods of one stage of a job in shards get instead.', scalars(ofPods)),
  }; // prettier-ignore
}
