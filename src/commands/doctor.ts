import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { constrainedMemory } from 'node:process';
import { totalmem, freemem, cpus } from 'node:os';
import { noResource, type ConvertError } from '../base/errors.js';
import { formatBytes, freeBytes } from '../base/files.js';
import { columns, factRows } from '../base/text.js';
import { defineCommand } from './types.js';

interface Check {
  readonly name: string;
  /** `missing`: fine, but something is slower or not possible; `failed`: nothing works. */
  readonly state: 'ok' | 'missing' | 'failed';
  readonly found: string;
  /** What to do about it. */
  readonly fix?: string;
  readonly tried?: readonly string[];
}

export const command = defineCommand({
  name: 'doctor',
  description:
    'Looks at Node, the compiler, the native core and its libraries, GPUs, memory and disk, and says what to install.\n' +
    'Exit code 4 when the native core does not load.',
  arguments: {},
  options: {},
  examples: [['doctor', 'Is this machine ready?']],
  async run(_, io) {
    const native = await checkNative();
    const checks: Check[] = [
      checkNode(),
      checkCompiler(),
      ...native,
      ...(native[0]!.state === 'ok' ? await checkCuda() : []),
      await checkTokenizer(),
      checkMemory(),
      await checkDisk(),
    ];
    const broken = checks.find((check) => check.state === 'failed');
    const marks = { ok: io.paint.green('ok'), missing: io.paint.yellow('missing'), failed: io.paint.red('failed') };
    const heads = columns(checks.map(({ name, state }) => [name, marks[state]]), 'll').split('\n'); // prettier-ignore
    const lines = checks.map(({ found }, i) => [heads[i]!, found] as const);
    const advice = checks.filter((c) => c.state !== 'ok').map(({ name, fix, tried }) => {
      const places = tried && tried.length > 0 ? `\n  looked for: ${tried.join(', ')}` : '';
      return `${name}: ${fix ?? ''}${places}`;
    }); // prettier-ignore
    return {
      data: { checks },
      text: [factRows(lines, io.width), ...advice].join('\n\n'),
      ...(broken && {
        failure: noResource(`${broken.name} failed`, {
          got: broken.found,
          ...(broken.fix !== undefined && { hint: broken.fix }),
        }),
      }),
    };
  },
});

function checkNode(): Check {
  const [major = 0, minor = 0] = process.versions.node.split('.').map(Number);
  const good = major > 20 || (major === 20 && minor >= 19);
  const found = `${process.version}, ${process.platform}-${process.arch}`;
  return good
    ? { name: 'Node', state: 'ok', found }
    : { name: 'Node', state: 'failed', found, fix: 'Node 20.19 or newer is needed.' };
}

function checkCompiler(): Check {
  const compiler = process.env.CXX ?? 'g++';
  const { status, stdout } = spawnSync(compiler, ['--version'], { encoding: 'utf8' });
  if (status === 0) return { name: 'C++ compiler', state: 'ok', found: stdout.split('\n')[0]! };
  return {
    name: 'C++ compiler',
    state: 'missing',
    found: `${compiler} does not run`,
    fix: 'Only needed to build the native core. Debian, Ubuntu: apt-get install g++; or set CXX.',
  };
}

async function checkNative(): Promise<Check[]> {
  const { openDevice } = await import('../backend/load.js');
  let info: Record<string, unknown>;
  try {
    const device = openDevice({ kind: 'cpu' });
    info = device.info();
    device.close();
  } catch (error) {
    const [found = '', ...hint] = (error as Error).message.split('\n');
    return [{ name: 'Native core', state: 'failed', found, fix: hint.join(' ').trim() }];
  }
  const { threads, isa, blas } = info as {
    threads: number;
    isa: string;
    blas: { path: string | null; tried: string[]; passedOver?: string };
  };
  const model = cpus()[0]?.model ?? 'CPU';
  return [
    { name: 'Native core', state: 'ok', found: `${model}, ${threads} threads, ${isa} kernels` },
    blas.passedOver !== undefined
      ? {
          name: 'OpenBLAS',
          state: 'ok',
          found: `not used: its kernels (${blas.passedOver}) are narrower than our own for AVX-512`,
          tried: blas.tried,
        }
      : blas.path === null
        ? {
            name: 'OpenBLAS',
            state: 'missing',
            found: 'not found; own kernels are used',
            fix: 'Large matrices are faster with it. Debian, Ubuntu: apt-get install libopenblas0-pthread',
            tried: blas.tried,
          }
        : { name: 'OpenBLAS', state: 'ok', found: blas.path, tried: blas.tried },
  ];
}

async function checkCuda(): Promise<Check[]> {
  const { cudaLibraryPath, joinDevices, openDevice } = await import('../backend/load.js');
  const path = cudaLibraryPath();
  if (!existsSync(path)) {
    return [
      {
        name: 'CUDA',
        state: 'missing',
        found: 'module not built; the CPU is used',
        fix: 'For a GPU: install CUDA 12.8 or newer (nvcc), set CUDA_HOME, then npm run build:native.',
        tried: [path],
      },
    ];
  }
  try {
    const device = openDevice({ kind: 'cuda' });
    const { name, memory } = device.info() as { name?: string; memory?: { total: number; free: number } };
    const size = memory === undefined ? '' : `, ${formatBytes(memory.total)}, ${formatBytes(memory.free)} free`;
    let nccl: Check = { name: 'NCCL', state: 'ok', found: '' };
    try {
      joinDevices([device]);
    } catch (error) {
      const { facts } = error as ConvertError;
      const fix = `Only for training on several GPUs (--devices). ${facts.hint}`;
      nccl = { name: 'NCCL', state: 'missing', found: facts.got ?? 'not found', fix };
    }
    const { libraries } = device.info() as { libraries: Record<'cuBLAS' | 'NCCL', string> };
    device.close();
    return [
      { name: 'CUDA', state: 'ok', found: `${name ?? 'GPU'}${size}` },
      { name: 'cuBLAS', state: 'ok', found: libraries.cuBLAS },
      nccl.state === 'ok' ? { ...nccl, found: libraries.NCCL } : nccl,
    ];
  } catch (error) {
    const { message, facts } = error as Error & { facts?: { got?: string } };
    return [
      {
        name: 'CUDA',
        state: 'missing',
        found: `${facts?.got ?? message.split('\n')[0]!}; the CPU is used`,
        fix: 'For a GPU: an NVIDIA driver (nvidia-smi must work) and a card of compute capability 8.0 or newer.',
        tried: [path],
      },
    ];
  }
}

async function checkTokenizer(): Promise<Check> {
  try {
    await import('@anush008/tokenizers');
    return { name: 'Tokenizer library', state: 'ok', found: '@anush008/tokenizers' };
  } catch (error) {
    return {
      name: 'Tokenizer library',
      state: 'failed',
      found: (error as Error).message.split('\n')[0]!,
      fix: 'Install again on this machine: npm ci (its native part comes as an optional package: do not use --omit=optional).',
    };
  }
}

function checkMemory(): Check {
  const limit = constrainedMemory();
  const total = totalmem();
  const bound = limit > 0 && limit < total ? `, this process may use ${formatBytes(limit)}` : '';
  return { name: 'Memory', state: 'ok', found: `${formatBytes(total)}, ${formatBytes(freemem())} free${bound}` };
}

async function checkDisk(): Promise<Check> {
  const here = process.cwd();
  return { name: 'Disk', state: 'ok', found: `${formatBytes(await freeBytes(here))} free in ${here}` };
}
