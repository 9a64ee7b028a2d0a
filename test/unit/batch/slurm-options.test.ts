import { describe, expect, it } from 'vitest';
import { checkCluster } from '../../../src/commands/batch-slurm.js';
import { readSlurm, requestOf } from '../../../src/batch/slurm-options.js';

const read = (...sections: unknown[]) => readSlurm(sections.map((value, i) => ({ where: `level ${i}`, value })));
const refusal = (section: unknown): string => {
  try {
    return JSON.stringify(read(section));
  } catch (error) {
    const { kind, message } = error as Error & { kind?: string };
    return `${kind}: ${message}`;
  }
};

describe('a slurm section', () => {
  it('becomes options of sbatch, nearer sections winning key by key', () => {
    const slurm = read(
      { partition: 'gpu,long', time: '4:00:00', cpus: 8n, memory: '64G', merge: { gres: 'none' } },
      undefined,
      {
        time: 90,
        gres: 'gpu:a100:2',
        constraint: 'a100|h100',
        grace: 300,
        extra: ['--nodelist=n[1-4]', '--exclusive'],
      },
    );
    expect(requestOf(slurm, 'worker')).toEqual({
      options: {
        partition: 'gpu,long',
        time: '90',
        'cpus-per-task': '8',
        mem: '64G',
        gres: 'gpu:a100:2',
        constraint: 'a100|h100',
        nodelist: 'n[1-4]',
        exclusive: true,
      },
      grace: 300,
    });
    expect(requestOf(slurm, 'merge').options).toMatchObject({ gres: 'none', partition: 'gpu,long', time: '90' });
  });

  it.each(['30', '4:00:00', '90:30', '1-12', '1-12:30', '1-12:30:00'])('takes the time limit %s', (time) => {
    expect(read({ time }).options).toEqual({ time });
  });

  it.each([
    [{ partitoin: 'gpu' }, /Unknown key "partitoin" \(slurm of level 0\)[^]*Did you mean partition\?/],
    [{ constructor: 'gpu' }, /Unknown key "constructor"/],
    [{ partition: 'gpu\n#SBATCH --uid=0' }, /Invalid value for partition/],
    [{ partition: 'gpu\n' }, /Invalid value for partition/],
    [{ partition: '$(touch x)' }, /Invalid value for partition/],
    [{ partition: 'gpu --wrap=id' }, /Invalid value for partition/],
    [{ partition: '--wrap=id' }, /Invalid value for partition/],
    [{ account: "a'; id; '" }, /Invalid value for account/],
    [{ gres: 'gpu:`id`' }, /Invalid value for gres/],
    [{ time: '4h' }, /Invalid value for time.*expected minutes/],
    [{ cpus: 0 }, /Invalid value for cpus/],
    [{ memory: '64GB; id' }, /Invalid value for memory/],
    [{ memory: ['64G'] }, /Invalid value for memory.*got object/],
    [{ constraint: 'a b' }, /Invalid value for constraint/],
    ['partition=gpu', /Expected a mapping/],
    [{ merge: { worker: {} } }, /Unknown key "worker" \(merge of slurm/],
    [{ extra: '--output=/etc/passwd' }, /Unknown option of sbatch in a job file: "output"/],
    [{ extra: ['--export=LD_PRELOAD=x.so'] }, /Unknown option of sbatch/],
    [{ extra: ['--wrap=id'] }, /Unknown option of sbatch/],
    [{ extra: ['--array=0-9'] }, /Unknown option of sbatch/],
    [{ extra: ['--nodelist=n1\n--wrap=id'] }, /Invalid value for --nodelist/],
    [{ extra: ['--comment="$(id)"'] }, /Invalid value for --comment/],
    [{ extra: ['--exclusive=user'] }, /--exclusive takes no value/],
    [{ extra: ['--nodelist'] }, /Invalid value for --nodelist/],
    [{ extra: ['-p gpu'] }, /not understood.*expected --name=value/],
    [{ extra: [7] }, /not understood/],
    [{ extra: ['--partition=x'] }, /--partition has a key of its own.*expected partition:/],
    [{ extra: ['--nodelst=n1'] }, /Did you mean nodelist\?/],
  ])('refuses %j', (section, expected) => {
    expect(refusal(section)).toMatch(expected);
    expect(refusal(section)).toMatch(/^usage: /);
  });
});

describe('options of batch for a cluster', () => {
  const given = { executor: 'slurm', wait: false, status: false, cancel: false, dryRun: false, parallel: undefined, metricsFile: undefined, metricsPort: undefined } as const; // prettier-ignore
  it.each([
    [{ status: true, cancel: true }, /--status and --cancel do not go together/],
    [{ wait: true, dryRun: true }, /--wait and --dry-run do not go together/],
    [{ executor: 'local', wait: true }, /--wait is for --executor slurm/],
    [{ parallel: 2 }, /--parallel is for jobs on this machine/],
    [{ metricsPort: 0 }, /Metrics.*need --wait/],
  ] as const)('refuses %j', (more, expected) => {
    expect(() => checkCluster({ ...given, ...more })).toThrow(expected);
  });
  it('takes metrics with --wait', () => {
    expect(() => checkCluster({ ...given, wait: true, metricsFile: 'x.prom' })).not.toThrow();
  });
});
