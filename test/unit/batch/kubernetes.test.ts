import { spawnSync } from 'node:child_process';
import { chmodSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { parseAllDocuments } from 'yaml';
import { z } from 'zod';
import { readJobs } from '../../../src/batch/file.js';
import { kubernetesFiles } from '../../../src/batch/kubernetes.js';
import { jobCommands } from '../../../src/commands/batch.js';
import { commands } from '../../../src/commands/index.js';

const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const known = await jobCommands(commands);
const mergeKeys = Object.keys((await commands.merge!.load()).command.options);
const schema = z.fromJSONSchema(JSON.parse(readFileSync(new URL('kubernetes.schema.json', import.meta.url), 'utf8')) as Parameters<typeof z.fromJSONSchema>[0]); // prettier-ignore

interface Manifest {
  metadata: { name: string; namespace?: string; labels: Record<string, string> };
  spec: {
    suspend?: boolean;
    backoffLimit?: number;
    backoffLimitPerIndex?: number;
    completionMode?: string;
    completions?: number;
    parallelism?: number;
    podFailurePolicy: { rules: { action: string; onExitCodes?: { values: number[] } }[] };
    template: { spec: { restartPolicy: string; containers: { name: string; args: string[]; workingDir: string; env: { name: string; value: string }[]; resources: { limits: Record<string, string> }; volumeMounts: object[] }[]; volumes: object[] } };
  };
} // prettier-ignore

async function files(yaml: string): Promise<Map<string, string>> {
  const path = join(folder, 'jobs.yaml');
  writeFileSync(path, yaml);
  const outputRoot = process.cwd();
  const jobs = await readJobs(path, { commands: known, environment: {}, outputRoot, workFolder: join(outputRoot, 'work') }); // prettier-ignore
  return kubernetesFiles({ jobs, name: 'night run', retries: 3, mergeKeys });
}
const manifests = (text: string): Manifest[] => parseAllDocuments(text).map((document) => document.toJS() as Manifest);
async function steps(yaml: string): Promise<Manifest[][]> {
  return [...(await files(yaml))].filter(([name]) => name.endsWith('.yaml')).map(([, text]) => manifests(text));
}
const refusal = (yaml: string): Promise<string> => files(yaml).then(() => 'accepted', (error: Error) => error.message); // prettier-ignore
const main = ({ spec }: Manifest) => spec.template.spec.containers[0]!;
const actions = ({ spec }: Manifest) =>
  Object.fromEntries(spec.podFailurePolicy.rules.flatMap(({ action, onExitCodes }) => (onExitCodes?.values ?? []).map((code) => [code, action]))); // prettier-ignore

const defaults = `
defaults:
  out: out/\${name}
  kubernetes: { image: example/convert:1, namespace: models, queue: gpus, volumes: { /work: models, /zoo: zoo:ro }, cpu: 8, memory: 64Gi, gpus: 1, user: 1000, node-selector: { zone: a } }
`;
const sharded = `${defaults}
jobs:
  - { name: int4, command: quantize, input: /zoo/m, shards: 4, samples: 16, overwrite: true, retries: 5, kubernetes: { parallelism: 2, merge: { gpus: 0, cpu: 500m } } }
  - { name: Look.At_It, command: inspect, input: out/int4 }
  - { name: half, command: convert, input: /zoo/m }
`;

describe('batch --emit k8s', () => {
  it('writes what the API takes: schema, and the rules that it has beside', async () => {
    const all = (await steps(sharded)).flat();
    expect(all.map(({ metadata }) => metadata.name)).toHaveLength(5);
    expect(new Set(all.map(({ metadata }) => metadata.name)).size).toBe(5);
    for (const manifest of all) {
      expect(schema.safeParse(manifest).error?.issues ?? []).toEqual([]);
      const { metadata, spec } = manifest;
      // pkg/apis/batch/validation: names of pods with an index, failure policy and limits per index ask for these.
      expect(`${metadata.name}-99999`).toMatch(/^[a-z0-9]([-a-z0-9]*[a-z0-9])?$/);
      expect(`${metadata.name}-99999`.length).toBeLessThanOrEqual(63);
      for (const value of Object.values(metadata.labels)) expect(value).toMatch(/^(?=.{1,63}$)[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?$/); // prettier-ignore
      expect(spec.template.spec.restartPolicy).toBe('Never');
      expect(spec.backoffLimitPerIndex === undefined).toBe(spec.completionMode !== 'Indexed');
      for (const { action, onExitCodes } of spec.podFailurePolicy.rules) {
        if (action === 'FailIndex') expect(spec.completionMode).toBe('Indexed');
        const values = onExitCodes?.values ?? [];
        expect(values).toEqual([...new Set(values)].sort((a, b) => a - b));
        expect(values).not.toContain(0);
      }
    }
  });

  it('has the schema refuse what is wrong', async () => {
    const [first] = (await steps(sharded)).flat();
    const wrong = (change: (manifest: Record<string, Record<string, unknown>>) => void) => {
      const copy = structuredClone(first) as unknown as Record<string, Record<string, unknown>>;
      change(copy);
      return schema.safeParse(copy).success;
    };
    expect(wrong(() => undefined)).toBe(true);
    expect(wrong(({ spec }) => (spec!.backofLimit = 1))).toBe(false);
    expect(wrong(({ spec }) => (spec!.backoffLimit = '1'))).toBe(false);
    expect(wrong(({ spec }) => delete spec!.template)).toBe(false);
  });

  it('makes plan, an Indexed Job of workers, and merge, one after another', async () => {
    const [first, second, third, fourth] = await steps(sharded);
    expect(first!.map(({ metadata }) => metadata.name).sort()).toEqual([expect.stringMatching(/^night-run-half-/), expect.stringMatching(/^night-run-int4-.*-plan$/)].sort()); // prettier-ignore
    const plan = first!.find(({ metadata }) => metadata.name.endsWith('-plan'))!;
    const [worker, merge] = [second![0]!, third![0]!];
    expect(main(plan).args.slice(0, 1)).toEqual(['plan']);
    expect(main(plan).args).toEqual(expect.arrayContaining(['--input=/zoo/m', '--out=out/int4', '--samples=16', '--shards=4', '--device=cuda', '--threads=8'])); // prettier-ignore
    expect(worker.spec).toMatchObject({ completionMode: 'Indexed', completions: 4, parallelism: 2, backoffLimitPerIndex: 5, suspend: true }); // prettier-ignore
    expect(main(worker).args).toEqual(['worker', 'out/int4.part', '--device=cuda', '--threads=8', '--shard=$(JOB_COMPLETION_INDEX)/4']); // prettier-ignore
    expect(main(merge).args).toEqual(['merge', 'out/int4.part', '--overwrite', '--device=cpu', '--threads=1']);
    expect(main(merge).resources.limits).toEqual({ cpu: '500m', memory: '64Gi' });
    expect(main(worker).resources.limits).toEqual({ cpu: '8', memory: '64Gi', 'nvidia.com/gpu': '1' });
    expect(main(fourth![0]!).args.slice(0, 2)).toEqual(['inspect', '--input=out/int4']);
    expect(worker.metadata).toMatchObject({ namespace: 'models', labels: { 'kueue.x-k8s.io/queue-name': 'gpus' } });
    expect(main(worker)).toMatchObject({ workingDir: '/work', volumeMounts: [{ mountPath: '/work' }, { mountPath: '/zoo', readOnly: true }] }); // prettier-ignore
  });

  it('says what becomes of a pod by our exit codes', async () => {
    const [first, second] = await steps(sharded);
    expect(actions(second![0]!)).toEqual({ 75: 'Ignore', 1: 'FailIndex', 2: 'FailJob', 3: 'FailIndex', 4: 'Count' });
    expect(actions(first![0]!)).toEqual({ 75: 'Ignore', 1: 'FailJob', 2: 'FailJob', 3: 'FailJob', 4: 'Count' });
    expect(first![0]!.spec.podFailurePolicy.rules[0]).toMatchObject({ action: 'Ignore', onPodConditions: [{ type: 'DisruptionTarget' }] }); // prettier-ignore
    // A lock looks alive for five minutes after its pod died without a word: exit code 1 must not come from that.
    expect(main(second![0]!).env).toEqual([{ name: 'DEEPSEEK_CONVERT_LOCK_WAIT', value: '600' }]);
  });

  it('gives nothing of a job file to the kubelet or to YAML as more than text', async () => {
    const [[job]] = (await steps(`${defaults}
jobs: [{ name: x, command: generate, input: /zoo/m, prompt: "$(HOME) $$(A)\\n- evil: {{ x }} #" }]`)) as [[Manifest]];
    const prompt = main(job).args.find((argument) => argument.startsWith('--prompt='))!;
    expect(prompt).toBe('--prompt=$$(HOME) $$$$(A)\n- evil: {{ x }} #');
    const job2 = `${defaults}\njobs: [{ name: x, command: inspect, input: m, kubernetes: `;
    expect(await refusal(`${job2}{ volumes: { /work/../etc: claim } } }]`)).toMatch(/not allowed in volumes/);
    expect(await refusal(`${job2}{ volumes: { /work: "claim\\nx" } } }]`)).toMatch(/Invalid value for \/work/);
    expect(await refusal(`${job2}{ image: "a b" } }]`)).toMatch(/Invalid value for image/);
    expect(await refusal(`${job2}{ queu: x } }]`)).toMatch(/Unknown key "queu"[^]*Did you mean queue/);
    expect(await refusal(`${job2}{ worker: { queue: x } } }]`)).toMatch(/Unknown key "queue"/);
    expect(await refusal(`jobs: [{ name: x, command: inspect, input: m }]`)).toMatch(/has no image/);
    expect(await refusal(`jobs: [{ name: x, command: inspect, input: m, kubernetes: { image: a } }]`)).toMatch(/has no volume/); // prettier-ignore
  });

  it('applies the steps in order, waits for each, and stops where one fails', async () => {
    const at = join(folder, 'run');
    mkdirSync(at);
    for (const [name, text] of await files(sharded)) writeFileSync(join(at, name), text);
    const bin = join(folder, 'bin');
    mkdirSync(bin);
    const kubectl = (state: string): string => `#!/bin/sh
echo "$1 $(basename "$3")" >> "${at}/said"
if [ "$1" = apply ]; then echo 0 > "${at}/looks"; exit 0; fi
looks=$(($(cat "${at}/looks") + 1)); echo $looks > "${at}/looks"
if [ $looks -lt 3 ]; then echo "a <none>"; echo "b Complete"; elif [ "$(basename "$3")" = step-2.yaml ]; then echo "a ${state}"; else echo "a SuccessCriteriaMet,Complete"; fi
`; // prettier-ignore
    const run = (state: string) => {
      writeFileSync(join(bin, 'kubectl'), kubectl(state));
      chmodSync(join(bin, 'kubectl'), 0o755);
      writeFileSync(join(at, 'said'), '');
      const env = { ...process.env, PATH: `${bin}:${process.env.PATH}`, POLL_SECONDS: '0' };
      const { status } = spawnSync('sh', [join(at, 'run.sh')], { env, timeout: 20_000 });
      return { status, said: readFileSync(join(at, 'said'), 'utf8').trim().split('\n') };
    };
    const looks = (step: number) => [`apply step-${step}.yaml`, ...Array<string>(3).fill(`get step-${step}.yaml`)];
    expect(run('Complete')).toEqual({ status: 0, said: [1, 2, 3, 4].flatMap(looks) });
    expect(run('FailureTarget,Failed')).toEqual({ status: 1, said: [1, 2].flatMap(looks) });
  });
});
