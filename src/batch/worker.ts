import { spawn } from 'node:child_process';
import { createWriteStream } from 'node:fs';
import { constants } from 'node:os';
import type { ProgressStep } from '../base/log.js';
import { appendNoLink } from '../base/files.js';
import { usageOf, type Usage } from '../base/usage.js';

/** One line of a worker's `--progress json`. */
interface WorkerEvent extends Partial<ProgressStep>, Partial<WorkerUsage> {
  readonly event: string;
  readonly text?: string;
}

export interface WorkerUsage extends Usage {
  /** Known at the end, from the worker itself: most bytes of tensors on each device. */
  readonly devices: readonly { readonly device: string; readonly memory: number }[];
}

export interface WorkerOptions {
  /** Path of our own program. */
  readonly program: string;
  readonly argv: readonly string[];
  readonly environment: NodeJS.ProcessEnv;
  /** What the worker says on stderr is added here. */
  readonly logPath: string;
  readonly onStep: (step: ProgressStep) => void;
  /** What it has used since it began: twice a second, and what it says itself at its end. */
  readonly onUsage: (usage: WorkerUsage) => void;
  readonly onWarning: (text: string) => void;
}

export interface Outcome {
  readonly exitCode: number | null;
  readonly signal: NodeJS.Signals | null;
  /** The one object of `--json`; undefined when the worker died before. */
  readonly result: Readonly<Record<string, unknown>> | undefined;
  readonly message: string | null;
  readonly seconds: number;
  /** In bytes, as far as it was seen. */
  readonly usage: WorkerUsage;
}

/** Results beyond this are cut off, and then no JSON: only a broken worker writes so much. */
const mostOutput = 256e6;
const lookEveryMs = 500;

/** One process that does one job: our own program, by itself, so that a crash takes nothing else along. */
export class Worker {
  readonly pid: number | undefined;
  readonly ended: Promise<Outcome>;
  readonly #kill: (signal: NodeJS.Signals) => void;

  constructor({ program, argv, environment, logPath, onStep, onUsage, onWarning }: WorkerOptions) {
    const started = performance.now();
    // A group of its own: Ctrl-C in the terminal reaches the batch alone, which tells the workers once.
    const child = spawn(process.execPath, [program, ...argv, '--json', '--progress=json'], {
      env: environment,
      stdio: ['ignore', 'pipe', 'pipe'],
      detached: true,
    });
    this.pid = child.pid;
    this.#kill = (signal) => child.kill(signal);
    // Numbers are taken; the types do not know it.
    const log = createWriteStream(logPath, { flags: appendNoLink as unknown as string });
    log.on('error', (error) => onWarning(`The log cannot be written: ${error.message}`));
    log.write(`${JSON.stringify({ event: 'start', time: new Date().toISOString(), argv })}\n`);

    let [stdout, rest, lastText] = ['', '', ''];
    let usage: WorkerUsage = { memory: null, read: null, written: null, devices: [] };
    const used = (seen: Partial<WorkerUsage>) => {
      const largest = (key: keyof Usage) => Math.max(usage[key] ?? 0, seen[key] ?? 0) || null;
      const devices = seen.devices ?? usage.devices;
      usage = { memory: largest('memory'), read: largest('read'), written: largest('written'), devices };
      onUsage(usage);
    };
    const watch = setInterval(() => child.pid !== undefined && used(usageOf(child.pid)), lookEveryMs).unref();
    child.stdout.setEncoding('utf8').on('data', (text: string) => {
      if (stdout.length < mostOutput) stdout += text;
    });
    child.stderr.setEncoding('utf8').on('data', (text: string) => {
      log.write(text);
      const lines = (rest + text).split('\n');
      rest = lines.pop()!;
      for (const line of lines) {
        const event = parse(line) as WorkerEvent | undefined;
        if (event === undefined) {
          if (line.trim() !== '') lastText = line;
        } else if (event.event === 'progress') {
          onStep(event as unknown as ProgressStep);
        } else if (event.event === 'usage') {
          used(event);
        } else if (event.event === 'warning') {
          onWarning(event.text ?? '');
        }
      }
    });
    this.ended = new Promise((done) => {
      const end = (exitCode: number | null, signal: NodeJS.Signals | null, failure?: Error) => {
        clearInterval(watch);
        const result = parse(stdout);
        const error = result?.error as { message?: string } | undefined;
        const died = signal === null ? null : `killed by ${signal}`;
        const code = exitCode === 0 ? null : `exit code ${exitCode}${lastText === '' ? '' : `: ${lastText}`}`;
        const message = error?.message ?? failure?.message ?? died ?? code;
        const seconds = (performance.now() - started) / 1000;
        log.end(`${JSON.stringify({ event: 'end', exitCode, signal, seconds })}\n`, () =>
          done({ exitCode, signal, result, message, seconds, usage }),
        );
        // A disk that is full must not keep the batch waiting for the log.
        log.once('error', () => done({ exitCode, signal, result, message, seconds, usage }));
      };
      child.once('close', (code, signal) => end(code, signal));
      child.once('error', (error) => child.pid === undefined && end(null, null, error));
    });
  }

  /** Asks the worker to stop after its block. */
  stop(): void {
    this.#kill('SIGTERM');
  }

  kill(): void {
    this.#kill('SIGKILL');
  }
}

/** Failures that another try can mend: a crash, a lack of resources, a bug, a worker that was told to stop. */
export const worthRetrying = ({ exitCode }: Outcome): boolean => exitCode === null || [4, 70, 75].includes(exitCode) || exitCode > 128; // prettier-ignore

/** Seconds before try n + 1 when resources lacked: others may give some back. */
export const patience = (attempt: number): number => Math.min(60, 2 ** attempt);

/** Exit code as shells give it: 137 for SIGKILL. */
export const shellCode = ({ exitCode, signal }: Pick<Outcome, 'exitCode' | 'signal'>): number =>
  exitCode ?? 128 + (signal === null ? 0 : constants.signals[signal]);

function parse(text: string): Readonly<Record<string, unknown>> | undefined {
  if (!text.startsWith('{')) return undefined;
  try {
    return JSON.parse(text) as Record<string, unknown>;
  } catch {
    return undefined; // cut off by a crash
  }
}
