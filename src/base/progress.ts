import type { Ora } from 'ora';
import type { Log, ProgressStep } from './log.js';
import { duration, reflow } from './text.js';

export type ProgressMode = 'tty' | 'plain' | 'json' | 'none';

export interface ProgressOptions {
  readonly mode: ProgressMode;
  /** Warnings only. */
  readonly quiet: boolean;
  readonly verbose: boolean;
  readonly stream: NodeJS.WriteStream;
  /** Colours words of log lines; the identity where there are no colours. */
  readonly warnColor: (text: string) => string;
  readonly dimColor: (text: string) => string;
  /** Seconds without output after which a line says that the job lives (off a terminal). */
  readonly heartbeat?: number;
  /** Seconds since some start; tests bring their own. */
  readonly clock?: () => number;
  /** What the process has used; told once at the end in JSON. */
  readonly usage?: () => Readonly<Record<string, unknown>>;
}

export interface ProgressLog extends Log {
  /** Ends the spinner and the heartbeat; what is printed afterwards stands alone. */
  stop(): void;
}

/** Steps that say something are all shown, up to this number of them; of others, one line a second. */
const everyStep = 200;

interface Stage {
  readonly name: string;
  readonly started: number;
  /** Steps that were done before (a resumed job): they say nothing about speed. */
  readonly doneBefore: number;
  last: ProgressStep;
  lastAt: number;
}

/** The Log of a command: lines on stderr, a spinner on a terminal, JSON lines for machines. */
export async function createProgress(options: ProgressOptions): Promise<ProgressLog> {
  const { mode, stream } = options;
  const spinner = mode === 'tty' && !options.quiet ? await startSpinner(stream) : undefined;
  return mode === 'json' ? jsonProgress(options) : textProgress(options, spinner);
}

async function startSpinner(stream: NodeJS.WriteStream): Promise<Ora> {
  const { default: ora } = await import('ora');
  return ora({ stream, discardStdin: false, hideCursor: true });
}

const monotonic = () => performance.now() / 1000;

function textProgress(options: ProgressOptions, spinner: Ora | undefined): ProgressLog {
  const { mode, quiet, verbose, stream, warnColor, dimColor, clock = monotonic, heartbeat: beat = 30 } = options;
  const tick = beat / 6;
  const shows = mode !== 'none' && !quiet;
  let stage: Stage | undefined;
  let lastLine = clock();
  /** The last line that was no sign of life only. */
  let lastEvent = lastLine;
  let lastStepLine = lastLine;

  const write = (line: string, event = true) => {
    const spinning = spinner?.isSpinning === true;
    if (spinning) spinner.clear();
    stream.write(`${stream.isTTY ? reflow(line, stream.columns) : line}\n`);
    if (spinning) spinner.render();
    lastLine = clock();
    if (event) lastEvent = lastLine;
  };
  const heartbeat = setInterval(() => {
    if (!shows || spinner || clock() - lastLine < beat - tick) return;
    const at = stage && `${stage.name} ${stage.last.done}/${stage.last.total}, ${duration(clock() - stage.started)}`;
    write(dimColor(`... still working${at === undefined ? '' : `: ${at}`}`), false);
  }, tick * 1000);
  heartbeat.unref();

  const finishStage = () => {
    stage = undefined;
    spinner?.stop();
  };
  return {
    debug: (text) => verbose && !quiet && write(dimColor(text)),
    info: (text) => !quiet && write(text),
    warn: (text) => write(`${warnColor('warning:')} ${text}`),
    progress(step) {
      if (!shows) return;
      const now = clock();
      if (stage?.name !== step.stage || step.done < stage.last.done) {
        finishStage();
        const doneBefore = step.done <= 1 ? 0 : step.done - 1;
        stage = { name: step.stage, started: lastEvent, doneBefore, last: step, lastAt: lastEvent };
        lastStepLine = now;
      }
      const last = step.done >= step.total;
      const telling = step.detail !== undefined && step.total <= everyStep;
      if (step.done > 0 && (telling || last || now - lastStepLine >= 1)) {
        write(stepLine(stage, step, now, telling ? stage.lastAt : stage.started));
        lastStepLine = now;
      }
      [stage.last, stage.lastAt] = [step, now];
      if (last) return finishStage();
      if (spinner) {
        spinner.text = spinnerText(stage, step, now);
        if (!spinner.isSpinning) spinner.start();
      }
    },
    stop() {
      clearInterval(heartbeat);
      finishStage();
    },
  };
}

/** `since`: when what the line tells of began. */
function stepLine(stage: Stage, step: ProgressStep, now: number, since: number): string {
  const counter = `${String(step.done).padStart(String(step.total).length)}/${step.total}`;
  const detail = step.detail === undefined ? '' : `  ${step.detail}`;
  return `${step.stage} ${counter}${detail}  ${duration(now - since)}${left(stage, step, now)}`;
}

function spinnerText(stage: Stage, step: ProgressStep, now: number): string {
  return `${step.stage} ${step.done}/${step.total}, ${duration(now - stage.started)}${left(stage, step, now)}`;
}

function left(stage: Stage, step: ProgressStep, now: number): string {
  const done = step.done - stage.doneBefore;
  if (done < 1 || step.done >= step.total) return '';
  return `, ${duration(((now - stage.started) / done) * (step.total - step.done))} left`;
}

function jsonProgress(options: ProgressOptions): ProgressLog {
  const { quiet, verbose, stream, heartbeat = 30, clock = monotonic } = options;
  const start = clock();
  let last = start;
  let { usage } = options;
  const emit = (event: string, facts: Record<string, unknown>) => {
    last = clock();
    stream.write(`${JSON.stringify({ event, seconds: Number((last - start).toFixed(3)), ...facts })}\n`);
  };
  const beat = setInterval(
    () => {
      if (!quiet && clock() - last >= heartbeat - heartbeat / 6) emit('heartbeat', {});
    },
    (heartbeat / 6) * 1000,
  );
  beat.unref();
  return {
    debug: (text) => verbose && !quiet && emit('debug', { text }),
    info: (text) => !quiet && emit('info', { text }),
    warn: (text) => emit('warning', { text }),
    progress: ({ stage, done, total, detail, data }) =>
      !quiet && emit('progress', { stage, done, total, detail, data }),
    stop() {
      clearInterval(beat);
      if (usage && !quiet) emit('usage', usage());
      usage = undefined;
    },
  };
}
