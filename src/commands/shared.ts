import { existsSync } from 'node:fs';
import { availableParallelism } from 'node:os';
import type { Device } from '../backend/device.js';
import type { DeviceOptions } from '../backend/types.js';
import type { JobEnv } from '../backend/env.js';
import { badUsage } from '../base/errors.js';
import { Expected, byteSize, choice, custom, flag, integer, text, type Values } from '../base/options.js';
import type { Io } from './types.js';

/** Options of every command. */
export const commonOptions = {
  json: flag({ section: 'Output:', help: 'One JSON object on stdout, errors too.' }),
  progress: choice(['auto', 'tty', 'plain', 'json', 'none'], {
    default: 'auto',
    section: 'Output:',
    help: 'How progress is shown on stderr.',
  }),
  quiet: flag({ short: 'q', section: 'Output:', help: 'Warnings and errors only.' }),
  verbose: flag({ short: 'v', section: 'Output:', help: 'Say more.' }),
  color: flag({
    default: true,
    section: 'Output:',
    help: 'Colours (also off with NO_COLOR, on with FORCE_COLOR).',
    off: 'No colours (also with NO_COLOR; FORCE_COLOR turns them on).',
  }),
  configFile: text({ value: 'job.yaml', section: 'Output:', help: 'Options from a file, by their names.' }),
} as const;

/** The model that a command reads. */
export const input = text({
  required: true,
  value: 'in',
  aliases: ['input-model'],
  help: 'The model to read: a Hugging Face folder, or one .safetensors, .bin, .pt, .pth, .gguf or .onnx file.',
});

/** Spread into the options of each command that reads a model. */
export const inputOptions = {
  config: text({ value: 'path', help: "The model's config.json, where it does not lie beside the weights." }),
} as const;

const outputAs = (what: string) =>
  text({
    required: true,
    short: 'o',
    value: 'path',
    aliases: ['output-model'],
    help: `Where the result goes: ${what}.`,
  });

/** Spread into the options of each command that writes a model. */
export const outputOptions = {
  out: outputAs('a folder, or one .safetensors, .bin, .pt or .pth file'),
  overwrite: flag({ help: 'Replace an output that exists, once the new one is complete and verified.' }),
  restart: flag({ help: 'Throw away what an interrupted run left, instead of going on with it.' }),
  dryRun: flag({ help: 'Show what would be done to each tensor, and memory and disk needed; read headers only.' }),
} as const;
export const folderOutputOptions = { ...outputOptions, out: outputAs('a folder') } as const;
export const anyOutputOptions = {
  ...outputOptions,
  out: outputAs('a folder, or one .safetensors, .bin, .pt, .pth or .gguf file'),
} as const;

export type DeviceChoice = 'auto' | 'cpu' | 'cuda' | `cuda:${number}`;

const section = 'Machine:';
/** Spread into the options of each command that computes. */
export const deviceOptions = {
  device: custom(
    { default: 'auto', section, help: 'Where to compute. auto takes a CUDA GPU, else the CPU.' },
    'auto|cpu|cuda[:n]',
    (given): DeviceChoice => {
      if (!/^(auto|cpu|cuda(:\d+)?)$/.test(given)) throw new Expected('auto, cpu, cuda or cuda:0, cuda:1 ...');
      return given as DeviceChoice;
    },
  ),
  threads: integer({ min: 1, max: 1024, section, defaultNote: 'all cores', help: 'CPU threads to compute with.' }),
  ram: byteSize({ section, defaultNote: 'what the machine has', help: 'Most host memory for tensors: 16GB, 8GiB.' }),
  vram: byteSize({ section, defaultNote: 'what the GPU has', help: 'Most GPU memory for tensors.' }),
  trace: flag({ section, help: 'Wait for each operation, which is slower, and say at the end where the time went.' }),
} as const;

export const seedOption = {
  seed: integer({ min: 0, default: 0, help: 'Seed of everything random; the same seed gives the same bytes.' }),
} as const;

export type DeviceValues = Values<typeof deviceOptions>;

/** The same for commands whose work several devices of one host can share. */
export const groupOptions = {
  ...deviceOptions,
  devices: custom(
    { section, help: 'Train on several devices of this host, in place of --device: the windows of a step are divided among them. GPUs need NCCL.' },
    'cuda:0,cuda:1',
    readDevices,
  ),
} as const; // prettier-ignore

/** Devices of one kind, each GPU once. */
function readDevices(given: string): readonly DeviceChoice[] {
  const names = given.split(',').map((name) => name.trim());
  const gpus = names.every((name) => /^cuda:\d+$/.test(name)) && new Set(names.map(gpuIndex)).size === names.length;
  if (!gpus && !names.every((name) => name === 'cpu')) {
    throw new Expected('GPUs, each once: cuda:0,cuda:1 (or cpu,cpu to try it)');
  }
  return names as DeviceChoice[];
}

const gpuIndex = (name: string): number => Number(name.split(':')[1] ?? 0);

/** Devices that this process has closed, and the most bytes that tensors took there at once. */
export const devicesUsed: { device: string; memory: number }[] = [];

/** A job's surroundings with the device, or devices, that the options ask for; to be closed by `using`. */
export async function openEnvironment(
  given: DeviceValues & Partial<Values<typeof groupOptions>>,
  io: Io,
): Promise<JobEnv & Disposable> {
  const { openBestDevice, openDevice, joinDevices, cudaLibraryPath } = await import('../backend/load.js');
  const common: Omit<DeviceOptions, 'kind'> = given.threads === undefined ? {} : { threads: given.threads };
  const limit = (bytes: number | undefined) => (bytes === undefined ? {} : { memoryLimit: bytes });
  const openCpu = () => openDevice({ ...common, ...limit(given.ram), kind: 'cpu' });
  const openGpu = (name: string) =>
    openDevice({ ...common, ...limit(given.vram), kind: 'cuda', index: gpuIndex(name) });
  const openOne = (): Device => {
    if (given.device === 'cpu') return openCpu();
    if (given.device !== 'auto') return openGpu(given.device);
    // Without the module there is nothing to try, and the CPU is what the user has: no need to open twice.
    if (!existsSync(cudaLibraryPath())) {
      io.log.info('Computing on the CPU: the CUDA module is not built (deepseek-convert doctor says what it needs).');
      return openCpu();
    }
    const best = openBestDevice({ ...common, ...limit(given.vram) });
    if (best.reason === undefined) return best.device;
    io.log.info(`Computing on the CPU: ${best.reason}`);
    if (given.ram === undefined) return best.device;
    best.device.close();
    return openCpu();
  };
  /** Several CPU devices share threads and memory. */
  const openShare = (name: string, n: number): Device => {
    if (name !== 'cpu') return openGpu(name);
    const threads = Math.max(1, Math.floor((given.threads ?? availableParallelism()) / n));
    return openDevice({ threads, ...limit(given.ram && given.ram / n), kind: 'cpu' });
  };
  const devices: Device[] = [];
  const close = (): void => {
    for (const device of devices) {
      const name = device.kind === 'cpu' ? 'cpu' : `cuda:${device.index}`;
      if (given.trace) io.log.info(traceTable(name, device.trace()));
      devicesUsed.push({ device: name, memory: device.memory().peak });
      device.close();
    }
  };
  try {
    if (given.devices === undefined) devices.push(openOne());
    else if (given.device === 'auto' || !asks(io, 'device')) {
      for (const name of given.devices) devices.push(openShare(name, given.devices.length));
    } else {
      throw badUsage('--device and --devices both say where to compute', { expected: 'one of them' });
    }
    const [device] = devices as [Device, ...Device[]];
    if (device.kind === 'cpu' && given.vram !== undefined) {
      io.log.warn('--vram has no effect on the CPU; --ram is the limit there.');
    }
    if (given.trace) for (const one of devices) one.trace();
    const group = devices.length > 1 ? { group: joinDevices(devices) } : {};
    return { device, ...group, log: io.log, signal: io.signal, [Symbol.dispose]: close };
  } catch (error) {
    for (const device of devices) device.close();
    throw error;
  }
}

/** Sizes that take less than this share of the time get no line of their own. */
const leastShare = 0.005;

function traceTable(device: string, rows: ReturnType<Device['trace']>): string {
  const sum = (some: typeof rows, of: 'calls' | 'seconds') => some.reduce((n, row) => n + row[of], 0);
  const total = sum(rows, 'seconds');
  const line = (name: string, ...cells: string[]): string => [name.padEnd(48), ...cells.map((cell) => cell.padStart(9))].join(' '); // prettier-ignore
  const figures = (some: typeof rows): string[] => {
    const seconds = sum(some, 'seconds');
    return [String(sum(some, 'calls')), seconds.toFixed(3), `${((100 * seconds) / total).toFixed(1)}%`];
  };
  const ops = [...new Set(rows.map(({ op }) => op))]
    .map((op) => rows.filter((row) => row.op === op))
    .sort((a, b) => sum(b, 'seconds') - sum(a, 'seconds'));
  return [
    line(`operation on ${device}`, 'calls', 'seconds', 'share'),
    ...ops.flatMap((sizes) => [
      line(sizes[0]!.op, ...figures(sizes)),
      ...sizes
        .filter(({ seconds }) => seconds > leastShare * total)
        .map((row) => line(`  ${row.sizes}`, ...figures([row]))),
    ]),
    line('all', ...figures(rows)),
  ].join('\n');
}

/** `650M` -> 650,000,000. */
export function readScaled(given: string, expected: string): number {
  const [, digits, unit = ''] = /^(\d+(?:\.\d+)?)([KMBT]?)$/i.exec(given.trim()) ?? [];
  const value = Math.round(Number(digits) * 1000 ** ' KMBT'.indexOf(unit.toUpperCase() || ' '));
  if (!(value >= 1 && Number.isSafeInteger(value))) throw new Expected(expected);
  return value;
}

/** Whether this job asks for an option: what stands in the environment is for all jobs, also those that have no use for it. */
export const asks = ({ settings }: Io, key: string): boolean => (settings.from[key] ?? 'environment') !== 'environment';
