import { createServer, type Server } from 'node:http';
import { resolve } from 'node:path';
import { noResource } from '../base/errors.js';
import { writeFileAtomic } from '../base/files.js';
import { jobStates, type JobState } from './types.js';

const prefix = 'deepseek_convert_';

interface Family {
  readonly type: 'counter' | 'gauge';
  readonly help: string;
  /** By labels as they are written: `stage="quantize"`. */
  readonly values: Map<string, number>;
}

/** Numbers of one batch, in the text format of Prometheus. Counters begin with the process, as they do everywhere. */
export class Metrics {
  readonly #families = new Map<string, Family>();

  constructor(version: string) {
    this.#define('jobs', 'gauge', 'Jobs of the batch by state.');
    this.#define('blocks_total', 'counter', 'Blocks of models that workers have finished, by stage.');
    this.#define('steps_total', 'counter', 'Blocks, tensors, windows or training steps that workers have finished, by stage.'); // prettier-ignore
    this.#define('stage_seconds_total', 'counter', 'Time of the workers by the stage that they were in; end: after the last step.'); // prettier-ignore
    this.#define(
      'tokens_total',
      'counter',
      'Tokens that went through models, by stage; one block of n counts for 1/n.',
    );
    this.#define('read_bytes_total', 'counter', 'Bytes that workers have read, from the page cache too.');
    this.#define('written_bytes_total', 'counter', 'Bytes that workers have written.');
    this.#define('job_duration_seconds', 'gauge', 'Duration of the last attempt of a job.');
    this.#define('job_attempts', 'gauge', 'Workers started for a job, over all runs.');
    this.#define('job_memory_peak_bytes', 'gauge', 'Largest resident memory of a worker of the job.');
    this.#define('job_device_memory_peak_bytes', 'gauge', 'Most memory that tensors of a worker took on a device at once.'); // prettier-ignore
    this.#define(
      'quantization_error_ratio',
      'gauge',
      'Mean relative output error of the linears that a job quantized.',
    );
    this.#define('retries_total', 'counter', 'Workers started again after a crash or for lack of resources.');
    this.#define('gate_failures_total', 'counter', 'Jobs that ended with a failed quality gate.');
    this.#define('batch_start_time_seconds', 'gauge', 'When this run of the batch began, since 1970.');
    this.#define(
      'batch_last_change_time_seconds',
      'gauge',
      'When a job last began, ended or finished a step, since 1970.',
    );
    this.#define('batch_running', 'gauge', '1 while the batch runs, 0 when it has ended.');
    this.#define('build_info', 'gauge', 'Always 1; the version is a label.');
    for (const name of ['read_bytes_total', 'written_bytes_total', 'retries_total', 'gate_failures_total']) this.add(name, {}, 0); // prettier-ignore
    this.set('build_info', { version }, 1);
    this.set('batch_start_time_seconds', {}, Date.now() / 1000);
    this.set('batch_running', {}, 1);
  }

  #define(name: string, type: Family['type'], help: string): void {
    this.#families.set(name, { type, help, values: new Map() });
  }

  #family(name: string): Family {
    const family = this.#families.get(name);
    if (family === undefined) throw new TypeError(`no metric ${name}`);
    return family;
  }

  set(name: string, labels: Readonly<Record<string, string>>, value: number): void {
    this.#family(name).values.set(written(labels), value);
  }

  add(name: string, labels: Readonly<Record<string, string>>, value: number): void {
    const { values } = this.#family(name);
    const key = written(labels);
    values.set(key, (values.get(key) ?? 0) + value);
  }

  /** The largest value that was ever given. */
  raise(name: string, labels: Readonly<Record<string, string>>, value: number): void {
    const { values } = this.#family(name);
    const key = written(labels);
    values.set(key, Math.max(values.get(key) ?? value, value));
  }

  /** Something went on. */
  changed(): void {
    this.set('batch_last_change_time_seconds', {}, Date.now() / 1000);
  }

  /** All states, also those of no job: a query must not meet gaps. */
  setStates(states: Iterable<JobState>): void {
    const all = [...states];
    for (const state of jobStates) this.set('jobs', { state }, all.filter((s) => s === state).length);
    this.changed();
  }

  text(): string {
    const lines = [...this.#families].flatMap(([name, { type, help, values }]) => {
      if (values.size === 0) return [];
      const samples = [...values].map(([labels, value]) => `${prefix}${name}${labels === '' ? '' : `{${labels}}`} ${value}`); // prettier-ignore
      return [`# HELP ${prefix}${name} ${help}`, `# TYPE ${prefix}${name} ${type}`, ...samples];
    });
    return `${lines.join('\n')}\n`;
  }
}

function written(labels: Readonly<Record<string, string>>): string {
  const escaped = (text: string) => text.replaceAll('\\', '\\\\').replaceAll('"', '\\"').replaceAll('\n', '\\n');
  return Object.entries(labels)
    .map(([name, value]) => `${name}="${escaped(value)}"`)
    .join(',');
}

/** Writes the metrics to a file, whole each time (node_exporter may read at any moment), at most once a second. */
export class MetricsFile {
  readonly #path: string;
  readonly #metrics: Metrics;
  #timer: NodeJS.Timeout | undefined;
  #writing: Promise<void> = Promise.resolve();

  constructor(path: string, metrics: Metrics) {
    this.#path = resolve(path);
    this.#metrics = metrics;
  }

  /** Soon. A failure is told by `flush`. */
  touch(): void {
    this.#timer ??= setTimeout(() => {
      this.#timer = undefined;
      this.#write();
    }, 1000);
  }

  #write(): void {
    this.#writing = this.#writing.then(() => writeFileAtomic(this.#path, this.#metrics.text()));
    this.#writing.catch(() => undefined);
  }

  async flush(): Promise<void> {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    this.#write();
    await this.#writing;
  }
}

/** Serves `/metrics`; port 0 takes a free one. Gives the server and its address. */
export async function serveMetrics(
  metrics: Metrics,
  { host, port }: { readonly host: string; readonly port: number },
): Promise<{ server: Server; url: string }> {
  const server = createServer((request, response) => {
    const path = request.url?.split('?')[0];
    if (path !== '/metrics' || (request.method !== 'GET' && request.method !== 'HEAD')) {
      response.writeHead(path === '/metrics' ? 405 : 404, { 'content-type': 'text/plain' }).end('See /metrics.\n');
      return;
    }
    response.writeHead(200, { 'content-type': 'text/plain; version=0.0.4; charset=utf-8' }).end(metrics.text());
  });
  await new Promise<void>((listening, refused) => {
    server.once(
      'error',
      (cause: NodeJS.ErrnoException) =>
      refused(noResource('Metrics cannot be served', { where: `${host}:${port}`, got: cause.message, hint: 'Choose another --metrics-port; 0 takes a free one.', cause })), // prettier-ignore
    );
    server.listen(port, host, listening);
  });
  const address = server.address();
  const chosen = typeof address === 'object' && address !== null ? address.port : port;
  server.unref();
  return { server, url: `http://${host.includes(':') ? `[${host}]` : host}:${chosen}/metrics` };
}
