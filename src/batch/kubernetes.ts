import { createHash } from 'node:crypto';
import { stringify } from 'yaml';
import { badUsage } from '../base/errors.js';
import { podRequest, type KubernetesOptions } from './kubernetes-options.js';
import { machine } from './shards.js';
import { tasksOf } from './slurm-script.js';
import type { ShardStage } from './slurm-options.js';
import { argumentsOf, flagsOf } from './state.js';
import type { Job } from './types.js';

export interface KubernetesBatch {
  readonly jobs: readonly Job[];
  /** Name of the job file, which names Jobs and labels. */
  readonly name: string;
  readonly retries: number;
  /** Options that `merge` has. */
  readonly mergeKeys: readonly string[];
}

/** Seconds that a pod waits for the lock of one that died without a word: longer than its owner may be silent. */
const lockWait = 600;
const defaultGrace = '300';

/**
 * The batch as Kubernetes Jobs, for `kubectl apply`: files by name. Kubernetes knows no order of Jobs, so there is a file
 * for each step (jobs that need nothing, then those that need these ...; plan, workers and merge of a model in shards are
 * three), and `run.sh`, which applies one after another. Errors: usage, where a job has no image or no volume.
 */
export function kubernetesFiles(batch: KubernetesBatch): Map<string, string> {
  const steps: { readonly title: string; readonly manifest: object }[][] = [];
  const ends = new Map<string, number>();
  for (const job of batch.jobs) {
    let at = Math.max(0, ...job.needs.map((need) => ends.get(need)!));
    for (const { stage, count } of tasksOf(job)) {
      (steps[at++] ??= []).push({ title: `${job.name}${stage === undefined ? '' : `, ${stage}`}`, manifest: manifestOf(job, stage, count, batch) }); // prettier-ignore
    }
    ends.set(job.name, at);
  }
  const width = String(steps.length).length;
  const nameOf = (i: number): string => `step-${String(i + 1).padStart(width, '0')}.yaml`;
  const files = steps.map((step, i): [string, string] => [
    nameOf(i),
    step
      .map(
        ({ title, manifest }) => `# ${title}\n${stringify(manifest, { lineWidth: 0, aliasDuplicateObjects: false })}`,
      )
      .join('---\n'),
  ]);
  return new Map([...files, ['run.sh', runScript(files.map(([name]) => name))]]);
}

function manifestOf(
  job: Job,
  stage: ShardStage | undefined,
  count: number | undefined,
  batch: KubernetesBatch,
): object {
  const options = job.kubernetes;
  const name = nameOf(batch.name, job.name, stage);
  const label = (text: string): string => text.replace(/[^A-Za-z0-9._-]/g, '-').slice(0, 63).replace(/^[^A-Za-z0-9]+|[^A-Za-z0-9]+$/g, ''); // prettier-ignore
  const labels = { 'app.kubernetes.io/name': 'deepseek-convert', 'app.kubernetes.io/instance': label(batch.name), 'app.kubernetes.io/component': stage ?? job.command }; // prettier-ignore
  const retries = job.retries ?? batch.retries;
  const { namespace, queue } = options;
  return {
    apiVersion: 'batch/v1',
    kind: 'Job',
    metadata: {
      name,
      ...(namespace !== undefined && { namespace }),
      labels: { ...labels, ...(queue !== undefined && { 'kueue.x-k8s.io/queue-name': queue }) },
      annotations: { 'deepseek-convert/job': job.name },
    },
    spec: {
      ...(queue !== undefined && { suspend: true }), // Kueue lets it go
      ...(count === undefined ? { backoffLimit: retries } : indexed(count, retries, options)),
      podFailurePolicy: { rules: failureRules(count !== undefined) },
      template: { metadata: { labels }, spec: podOf(job, stage, count, batch) },
    },
  };
}

/** Index i of the Job is shard i: the pods of one shard are counted apart from those of others. */
const indexed = (count: number, retries: number, { parallelism = String(count) }: KubernetesOptions) => ({
  completionMode: 'Indexed',
  completions: count,
  parallelism: Math.min(count, Number(parallelism)),
  backoffLimitPerIndex: retries,
});

/**
 * By our exit codes (docs/errors.md). Pods that were told to stop, or whose node went, are replaced and go on; usage fails
 * the Job, bad input and gates the shard: another try would end the same. All else (4: resources, 70: a bug, 137: out of
 * memory) counts as a try.
 */
function failureRules(isIndexed: boolean): object[] {
  const onCodes = (action: string, ...values: number[]) => ({ action, onExitCodes: { containerName: 'main', operator: 'In', values } }); // prettier-ignore
  return [
    { action: 'Ignore', onPodConditions: [{ type: 'DisruptionTarget', status: 'True' }] },
    onCodes('Ignore', 75),
    ...(isIndexed ? [onCodes('FailJob', 2), onCodes('FailIndex', 1, 3)] : [onCodes('FailJob', 1, 2, 3)]),
    onCodes('Count', 4),
  ];
}

function podOf(job: Job, stage: ShardStage | undefined, count: number | undefined, batch: KubernetesBatch): object {
  const options = job.kubernetes;
  const { image, cpu, memory, gpus, grace = defaultGrace } = podRequest(options, stage);
  const where = job.name;
  if (image === undefined) throw badUsage('A job has no image', { where, hint: 'Add  kubernetes: { image: ... }  to the job or to defaults.' }); // prettier-ignore
  const mounts = Object.entries(options.volumes);
  if (mounts.length === 0) throw badUsage('A job has no volume to read and write', { where, hint: 'Add  kubernetes: { volumes: { /work: claim } }  to the job or to defaults.' }); // prettier-ignore
  const resources = Object.fromEntries(
    Object.entries({ cpu, memory, 'nvidia.com/gpu': gpus === '0' ? undefined : gpus }).filter(([, value]) => value !== undefined), // prettier-ignore
  );
  const { user, 'node-selector': nodeSelector, 'pull-secret': secret } = options;
  return {
    restartPolicy: 'Never',
    automountServiceAccountToken: false,
    terminationGracePeriodSeconds: Number(grace),
    ...(secret !== undefined && { imagePullSecrets: [{ name: secret }] }),
    ...(Object.keys(nodeSelector).length > 0 && { nodeSelector }),
    securityContext: {
      seccompProfile: { type: 'RuntimeDefault' },
      ...(user !== undefined && { runAsUser: Number(user), runAsGroup: Number(user), fsGroup: Number(user), runAsNonRoot: user !== '0' }), // prettier-ignore
    },
    containers: [
      {
        name: 'main',
        image,
        command: ['deepseek-convert'],
        args: argvOf(job, stage, count, batch).map(literal).concat(stage === 'worker' ? [`--shard=$(JOB_COMPLETION_INDEX)/${count}`] : []), // prettier-ignore
        workingDir: options.folder ?? mounts[0]![0],
        env: [{ name: 'DEEPSEEK_CONVERT_LOCK_WAIT', value: String(lockWait) }],
        resources: { requests: resources, limits: resources },
        securityContext: { allowPrivilegeEscalation: false, capabilities: { drop: ['ALL'] } },
        volumeMounts: mounts.map(([mountPath, claim], i) => ({ name: `volume-${i}`, mountPath, ...(isReadOnly(claim) && { readOnly: true }) })), // prettier-ignore
      },
    ],
    volumes: mounts.map(([, claim], i) => ({
      name: `volume-${i}`,
      persistentVolumeClaim: { claimName: claim.replace(/:ro$/, ''), ...(isReadOnly(claim) && { readOnly: true }) },
    })),
  };
}

const isReadOnly = (claim: string): boolean => claim.endsWith(':ro');

/** Paths stand as in the job file: relative ones begin at the pod's working directory. */
function argvOf(
  job: Job,
  stage: ShardStage | undefined,
  count: number | undefined,
  { mergeKeys }: KubernetesBatch,
): string[] {
  const { cpu, gpus } = podRequest(job.kubernetes, stage);
  const asks = (key: string): boolean => job.given.has(key);
  const own = [
    // A pod with a GPU must not compute on the CPU unnoticed; merge, without one, not look for that of the plan.
    ...('device' in job.values && !asks('device') ? [`--device=${Number(gpus ?? 0) > 0 ? 'cuda' : 'cpu'}`] : []),
    ...('threads' in job.values && !asks('threads') && cpu !== undefined ? [`--threads=${threadsOf(cpu)}`] : []),
  ];
  if (stage === undefined) return [...argumentsOf(job), ...own];
  if (stage === 'plan') return ['plan', ...argumentsOf(job).slice(1), `--shards=${job.shards}`, ...own];
  const folder = `${String(job.given.get('out')!.raw).replace(/\/+$/, '')}.part`;
  const flags = flagsOf(job, stage === 'worker' ? machine : mergeKeys);
  return [stage, folder, ...flags, ...own];
}

const threadsOf = (cpu: string): number => Math.max(1, Math.floor(cpu.endsWith('m') ? Number(cpu.slice(0, -1)) / 1000 : Number(cpu) || 1)); // prettier-ignore

/** Kubernetes fills `$(NAME)` in arguments; `$$` is a dollar. A job file of somebody else must not read a pod's variables. */
const literal = (argument: string): string => argument.replaceAll('$', '$$$$');

/** Pods are called `<name>-<index>` on the network: 63 small letters, digits and dashes in all. */
function nameOf(batch: string, job: string, stage: ShardStage | undefined): string {
  const full = `${batch}-${job}`;
  const plain = full.toLowerCase().replace(/[^a-z0-9]+/g, '-').replace(/^-|-$/g, ''); // prettier-ignore
  const hash = createHash('sha256').update(full).digest('hex').slice(0, 8);
  const stem = plain === full && plain.length <= 48 ? plain : `${plain.slice(0, 39).replace(/-$/, '')}-${hash}`;
  const named = /^[a-z0-9]/.test(stem) ? stem : `j${stem}`;
  return stage === undefined ? named : `${named}-${stage}`;
}

const runScript = (steps: readonly string[]): string => `#!/bin/sh
# Applies the steps of the batch one after another, each when the one before is complete. The same command again goes on:
# Jobs that are complete stay. Ends with 1 when a Job has failed (kubectl describe, kubectl logs say why).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
step() {
  kubectl apply -f "$here/$1"
  while :; do
    states=$(kubectl get -f "$here/$1" --no-headers -o 'custom-columns=NAME:.metadata.name,STATE:.status.conditions[?(@.status=="True")].type')
    case $states in
    *Failed*)
      printf 'Failed:\\n%s\\n' "$states" >&2
      exit 1
      ;;
    esac
    printf '%s\\n' "$states" | grep -qv Complete || return 0
    sleep "\${POLL_SECONDS:-10}"
  done
}
${steps.map((name) => `step ${name}`).join('\n')}
`;
