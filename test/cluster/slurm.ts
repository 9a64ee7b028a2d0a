import { execFileSync, spawn, type ChildProcess } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readdirSync,
  readFileSync,
  rmSync,
  writeFileSync,
} from 'node:fs';
import { createServer, type AddressInfo } from 'node:net';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';

const packages = ['slurm-wlm', 'munge'];
const programs = ['/usr/sbin/slurmctld', '/usr/sbin/slurmd', '/usr/sbin/munged', '/usr/bin/sbatch'];

/** Debian's Slurm, where it is missing. Its services stay as they are: the cluster of the tests has its own. */
export function installSlurm(): void {
  if (programs.every((path) => existsSync(path))) return;
  const apt = (...args: string[]) => {
    const asRoot = process.getuid!() === 0 ? ['apt-get'] : ['sudo', '-n', 'apt-get'];
    execFileSync(asRoot[0]!, [...asRoot.slice(1), '-q', '-y', ...args], {
      env: { ...process.env, DEBIAN_FRONTEND: 'noninteractive' },
      stdio: ['ignore', 'ignore', 'inherit'],
    });
  };
  apt('update');
  apt('install', '--no-install-recommends', ...packages);
}

/**
 * Slurm on this host alone: munged, slurmctld and a slurmd for each of two nodes, as children of this process, with
 * ports on loopback and everything they write in one temporary folder.
 */
export class Cluster {
  readonly folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-slurm-'));
  /** What programs need to talk to this cluster. */
  readonly environment = { SLURM_CONF: join(this.folder, 'slurm.conf') };
  readonly #daemons = new Map<string, ChildProcess>();
  #ports: Record<string, number> = {};

  static async start(): Promise<Cluster> {
    const cluster = new Cluster();
    try {
      await cluster.#start();
      return cluster;
    } catch (error) {
      console.error(cluster.logs());
      await cluster.stop();
      throw error;
    }
  }

  async #start(): Promise<void> {
    const [ctld, n1, n2] = await Promise.all([freePort(), freePort(), freePort()]);
    this.#ports = { ctld, n1, n2 };
    for (const name of ['ctld', 'log', 'spool/n1', 'spool/n2']) mkdirSync(join(this.folder, name), { recursive: true });
    mkdirSync(join(this.folder, 'munge'), { mode: 0o700 });
    mkdirSync(join(this.folder, 'run'), { mode: 0o755 });
    writeFileSync(join(this.folder, 'munge/key'), randomBytes(128), { mode: 0o600 });
    writeFileSync(this.environment.SLURM_CONF, this.#configuration());
    writeFileSync(join(this.folder, 'gres.conf'), 'NodeName=n[1-2] Name=gpu File=/dev/null\n');
    const at = (name: string) => join(this.folder, name);
    this.#daemon('munged', '/usr/sbin/munged', [
      '--foreground',
      '--force',
      `--key-file=${at('munge/key')}`,
      `--socket=${at('run/munge.sock')}`,
      `--pid-file=${at('run/munge.pid')}`,
      `--log-file=${at('log/munge.log')}`,
      `--seed-file=${at('munge/seed')}`,
    ]);
    await until('munged', () => existsSync(at('run/munge.sock')));
    this.#daemon('slurmctld', '/usr/sbin/slurmctld', ['-D', '-c']);
    this.startNode('n1');
    this.startNode('n2');
    await until('two idle nodes', () => this.run('sinfo', '-h', '-o', '%T %D') === 'idle 2');
  }

  startNode(node: 'n1' | 'n2'): void {
    this.#daemon(node, '/usr/sbin/slurmd', ['-D', '-N', node]);
  }

  #daemon(name: string, program: string, args: readonly string[]): void {
    const output = openSync(join(this.folder, 'log', `${name}.out`), 'a');
    const env = { ...process.env, ...this.environment };
    this.#daemons.set(name, spawn(program, args, { env, stdio: ['ignore', output, output] }));
  }

  /** A line of a Slurm program's answer; '' when it fails. */
  run(program: string, ...args: string[]): string {
    const env = { ...process.env, ...this.environment };
    try {
      return execFileSync(program, args, { env, encoding: 'utf8', stdio: ['ignore', 'pipe', 'pipe'] }).trim();
    } catch {
      return '';
    }
  }

  /** As when the power fails: the node's daemon and all processes of its jobs end at once. */
  killNode(node: 'n1' | 'n2'): number {
    this.#daemons.get(node)!.kill('SIGKILL');
    const mine = this.#processes().filter(({ environment }) => environment.includes(`SLURMD_NODENAME=${node}`));
    const parents = new Set(mine.map(({ parent }) => parent));
    const steps = this.#processes().filter(({ pid, name }) => parents.has(pid) && name === 'slurmstepd');
    for (const { pid } of [...steps, ...mine]) kill(pid);
    return mine.length;
  }

  /** Ends all that it started, and removes its folder. */
  async stop(): Promise<void> {
    const alive = [...this.#daemons.values()].filter(({ exitCode, signalCode }) => exitCode === null && signalCode === null); // prettier-ignore
    const ended = alive.map((child) => new Promise((done) => child.once('exit', done)));
    for (const child of alive) child.kill('SIGKILL');
    for (const { pid } of this.#processes()) kill(pid);
    await Promise.all(ended);
    rmSync(this.folder, { recursive: true, force: true, maxRetries: 3 });
  }

  /** What the daemons said, for a test that fails. */
  logs(): string {
    const folder = join(this.folder, 'log');
    if (!existsSync(folder)) return '';
    return readdirSync(folder).map((name) => `== ${name}\n${readFileSync(join(folder, name), 'utf8').slice(-4000)}`).join('\n'); // prettier-ignore
  }

  /** Processes that have this cluster's configuration in their environment: nobody else's. */
  #processes() {
    return readdirSync('/proc')
      .filter((name) => /^\d+$/.test(name) && Number(name) !== process.pid)
      .flatMap((name) => {
        try {
          const environment = readFileSync(`/proc/${name}/environ`, 'utf8').split('\0');
          if (!environment.includes(`SLURM_CONF=${this.environment.SLURM_CONF}`)) return [];
          const status = readFileSync(`/proc/${name}/status`, 'utf8');
          const field = (key: string) => new RegExp(`^${key}:\\s+(.*)$`, 'm').exec(status)?.[1] ?? '';
          return [{ pid: Number(name), name: field('Name'), parent: Number(field('PPid')), environment }];
        } catch {
          return []; // ended meanwhile
        }
      });
  }

  #configuration(): string {
    const host = hostname().split('.')[0]!;
    const R = this.folder;
    const node = (name: string) => `NodeName=${name} NodeHostname=${host} NodeAddr=127.0.0.1 Port=${this.#ports[name]} CPUs=2 RealMemory=4000 Gres=gpu:1`; // prettier-ignore
    return `ClusterName=test
SlurmctldHost=${host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=${R}/run/munge.sock
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmctldPort=${this.#ports.ctld}
SlurmctldPidFile=${R}/run/ctld.pid
SlurmdPidFile=${R}/run/%n.pid
StateSaveLocation=${R}/ctld
SlurmdSpoolDir=${R}/spool/%n
SlurmctldLogFile=${R}/log/slurmctld.log
SlurmdLogFile=${R}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0
SlurmdTimeout=3
MessageTimeout=3
KillWait=2
ReturnToService=2
JobRequeue=1
MailProg=/bin/true
GresTypes=gpu
${node('n1')}
${node('n2')}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
`;
  }
}

export async function until(what: string, ready: () => boolean | Promise<boolean>, seconds = 30): Promise<void> {
  const end = Date.now() + seconds * 1000;
  while (!(await ready())) {
    if (Date.now() > end) throw new Error(`${what}: not seen in ${seconds} s`);
    await delay(200);
  }
}

function kill(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch {
    // it has ended by itself
  }
}

const freePort = (): Promise<number> =>
  new Promise((resolve, reject) => {
    const server = createServer();
    server.once('error', reject);
    server.listen(0, '127.0.0.1', () => {
      const { port } = server.address() as AddressInfo;
      server.close(() => resolve(port));
    });
  });
