import { spawn, spawnSync } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { createServer, type AddressInfo } from 'node:net';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, describe, expect, it } from 'vitest';
import { parse, stringify } from 'yaml';
import { Metrics } from '../../src/batch/metrics.js';
import { deployment, type Emitted } from '../../src/targets/deploy/emit.js';
import { cli, json, root, v1, workFolder } from '../cli/support.js';
import { tools } from './tools.js';

const { prometheus, promtool } = tools();
const ours = (name: string): string => join(root, 'docs/prometheus', name);

/** What promtool says, which is nothing where it has no complaint about metrics. */
function check(args: readonly string[], input = ''): { status: number | null; said: string } {
  const { status, stdout, stderr } = spawnSync(promtool, args, { input, encoding: 'utf8' });
  return { status, said: `${stdout}${stderr}` };
}
const checkMetrics = (text: string) => check(['check', 'metrics'], text);

async function freePort(): Promise<number> {
  const server = createServer().listen(0, '127.0.0.1');
  await once(server, 'listening');
  const { port } = server.address() as AddressInfo;
  server.close();
  await once(server, 'close');
  return port;
}

const children: ReturnType<typeof spawn>[] = [];
afterAll(() => children.forEach((child) => child.kill()));

/** Prometheus with our own scrape config and rules, but for the port and for looking once a second. */
async function startPrometheus(
  folder: string,
  target: number,
): Promise<(query: string) => Promise<number | undefined>> {
  const port = await freePort();
  const config = parse(readFileSync(ours('prometheus.yml'), 'utf8')) as { scrape_configs: { static_configs: object[] }[] }; // prettier-ignore
  config.scrape_configs[0]!.static_configs = [{ targets: [`127.0.0.1:${target}`] }];
  const quick = { ...config, global: { scrape_interval: '1s', evaluation_interval: '1s' }, rule_files: [ours('deepseek-convert.rules.yml')] }; // prettier-ignore
  const path = join(folder, 'prometheus.yml');
  writeFileSync(path, stringify(quick));
  const child = spawn(
    prometheus,
    [`--config.file=${path}`, `--storage.tsdb.path=${folder}/tsdb`, `--web.listen-address=127.0.0.1:${port}`],
    { stdio: ['ignore', 'ignore', 'pipe'] },
  );
  children.push(child);
  let said = '';
  child.stderr.on('data', (text: Buffer) => (said += text.toString()));
  for (let i = 0; ; i++) {
    const ready = await fetch(`http://127.0.0.1:${port}/-/ready`).catch(() => undefined);
    if (ready?.ok) break;
    if (child.exitCode !== null || i > 300) throw new Error(`Prometheus did not start:\n${said}`);
    await delay(100);
  }
  return async (query) => {
    const answer = await fetch(`http://127.0.0.1:${port}/api/v1/query?query=${encodeURIComponent(query)}`);
    const { data } = (await answer.json()) as { data: { result: { value: [number, string] }[] } };
    return data.result.length === 0 ? undefined : Number(data.result[0]!.value[1]);
  };
}

describe('Prometheus', () => {
  it('scrapes a running batch; a query gives the counter of blocks, the rules give rates', async () => {
    const folder = workFolder();
    const quantize = `command: quantize, input: ${v1}, samples: 24, seq-len: 256, threads: 1, validate: false`;
    writeFileSync(
      join(folder, 'j.yaml'),
      `jobs:\n${['a', 'b', 'c'].map((name) => `  - { name: ${name}, out: ${name}, ${quantize} }\n`).join('')}`,
    );
    const port = await freePort();
    const query = await startPrometheus(folder, port);
    let over = false;
    const running = cli(['batch', 'j.yaml', '--json', '--metrics-port', String(port), '--metrics-file', 'batch.prom'], { cwd: folder }); // prettier-ignore
    void running.then(() => (over = true));
    const blocks = 'sum(deepseek_convert_blocks_total{job="deepseek-convert",stage="quantize"})';
    let [seen, rate, scraped] = [0, 0, ''];
    while (!over) {
      seen = Math.max(seen, (await query(blocks)) ?? 0);
      rate = Math.max(rate, (await query('deepseek_convert:blocks:rate5m{stage="quantize"}')) ?? 0);
      scraped = await fetch(`http://127.0.0.1:${port}/metrics`).then((answer) => answer.text(), () => scraped); // prettier-ignore
      await delay(200);
    }
    const finished = await running;
    expect(finished.code, finished.stderr).toBe(0);
    expect(json<{ jobs: { state: string }[] }>(finished).jobs.map(({ state }) => state)).toEqual(['done', 'done', 'done']); // prettier-ignore
    expect(checkMetrics(scraped)).toEqual({ status: 0, said: '' });
    const text = readFileSync(join(folder, 'batch.prom'), 'utf8');
    expect(checkMetrics(text)).toEqual({ status: 0, said: '' });
    // dense-6m has four blocks; the last scrape is at most a second older than the end.
    expect(text).toContain('\ndeepseek_convert_blocks_total{stage="quantize"} 12\n');
    expect(seen).toBeGreaterThanOrEqual(8);
    expect(seen).toBeLessThanOrEqual(12);
    expect(rate).toBeGreaterThan(0);
    const last = await query(`max_over_time(${blocks.replace(/sum\((.*)\)/, '$1')}[5m])`);
    expect(last).toBeGreaterThanOrEqual(seen); // a scrape may have come after the last look
    expect(last).toBeLessThanOrEqual(12);
    expect(await query('deepseek_convert_jobs{state="done"} offset 2s')).toBeGreaterThanOrEqual(1);
  });

  it('takes labels with quotes, backslashes and line ends as one value', async () => {
    const metrics = new Metrics('0"\\\n1');
    metrics.set('job_attempts', { name: 'a"} 1\nup{name="b' }, 2);
    const folder = workFolder();
    expect(checkMetrics(metrics.text())).toEqual({ status: 0, said: '' });
    const { createServer } = await import('node:http');
    const server = createServer((_, response) => response.end(metrics.text())).listen(0, '127.0.0.1');
    await once(server, 'listening');
    const query = await startPrometheus(folder, (server.address() as AddressInfo).port);
    let value: number | undefined;
    for (let i = 0; value === undefined && i < 100; i++) {
      value = await query('deepseek_convert_job_attempts{name="a\\"} 1\\nup{name=\\"b"}');
      await delay(100);
    }
    server.close();
    server.closeAllConnections();
    expect(value).toBe(2);
  });
});

describe('promtool', () => {
  it('accepts our scrape config and rules, and the alerts fire when they should', () => {
    expect(check(['check', 'config', ours('prometheus.yml')])).toMatchObject({ status: 0 });
    const folder = workFolder();
    const series = (name: string, values: string) => ({ series: `deepseek_convert_${name}`, values });
    const test = {
      rule_files: [ours('deepseek-convert.rules.yml')],
      evaluation_interval: '1m',
      tests: [
        {
          interval: '1m',
          input_series: [
            series('jobs{state="done",instance="x"}', '3x120'),
            series('jobs{state="gate",instance="x"}', '0x60 1x60'),
            series('blocks_total{stage="quantize",instance="x"}', '0+6x60 360x60'),
            series('batch_running{instance="x"}', '1x180'),
            // The second batch was killed after the first minute.
            series('batch_last_change_time_seconds{instance="x"}', '60+60x180'),
          ],
          alert_rule_test: [
            { eval_time: '30m', alertname: 'DeepseekConvertJobsFailed', exp_alerts: [] },
            { eval_time: '90m', alertname: 'DeepseekConvertJobsFailed', exp_alerts: [{ exp_labels: { instance: 'x' }, exp_annotations: { summary: '1 jobs of the batch on x failed, or their quality gates did.' } }] },
            { eval_time: '90m', alertname: 'DeepseekConvertStalled', exp_alerts: [] },
          ],
          promql_expr_test: [
            { expr: 'deepseek_convert:blocks:rate5m', eval_time: '30m', exp_samples: [{ labels: 'deepseek_convert:blocks:rate5m{instance="x",stage="quantize"}', value: 0.1 }] },
            { expr: 'deepseek_convert:jobs_done:ratio', eval_time: '90m', exp_samples: [{ labels: 'deepseek_convert:jobs_done:ratio{instance="x"}', value: 0.75 }] },
          ],
        },
        {
          interval: '1m',
          input_series: [
            series('batch_running{instance="y"}', '1x180'),
            series('batch_last_change_time_seconds{instance="y"}', '60x180'),
            series('retries_total{instance="y"}', '0+1x180'),
          ],
          alert_rule_test: [
            { eval_time: '30m', alertname: 'DeepseekConvertStalled', exp_alerts: [] },
            { eval_time: '90m', alertname: 'DeepseekConvertStalled', exp_alerts: [{ exp_labels: { instance: 'y' }, exp_annotations: { summary: 'No block on y was finished for an hour: it hangs, was killed, or its blocks are large.' } }] },
            { eval_time: '90m', alertname: 'DeepseekConvertRetries', exp_alerts: [{ exp_labels: { instance: 'y' }, exp_annotations: { summary: 'Workers on y die or lack resources again and again.' } }] },
          ],
        },
      ],
    }; // prettier-ignore
    const path = join(folder, 'test.yml');
    writeFileSync(path, stringify(test));
    expect(check(['test', 'rules', path])).toMatchObject({ status: 0 });
  });

  it('accepts what --emit prometheus writes, for each engine and for all', async () => {
    const folder = workFolder();
    const model = { name: 'it\'s "x"', context: 256, tensorParallel: 2 };
    const engines: [Emitted[], string][] = [
      [['prometheus'], 'gptq'],
      [['vllm', 'prometheus'], 'gptq'],
      [['sglang', 'prometheus'], 'awq'],
      [['triton', 'prometheus'], 'compressed-tensors'],
      [['llama.cpp', 'prometheus'], 'gguf'],
      [['vllm', 'triton', 'sglang', 'prometheus'], 'gptq'],
    ];
    for (const [i, [chosen, format]] of engines.entries()) {
      const at = join(folder, String(i));
      mkdirSync(at);
      for (const [name, text] of deployment(chosen, format, model)) writeFileSync(join(at, name), text);
      const found = check(['check', 'config', join(at, 'prometheus.yml')]);
      expect(found.status, found.said).toBe(0);
      expect(found.said).toMatch(/SUCCESS: [1-9]\d* rules found/);
    }
    const written = await cli(['quantize', v1, '-o', 'q', '--method', 'rtn', '--emit', 'vllm,prometheus', '--no-validate', '--device', 'cpu'], { cwd: folder }); // prettier-ignore
    expect(written.code, written.stderr).toBe(0);
    expect(check(['check', 'config', join(folder, 'q/prometheus.yml')])).toMatchObject({ status: 0 });
  });

  it('refuses what is wrong', () => {
    expect(checkMetrics('# TYPE a_total counter\na_total{x="1} 2\n').status).not.toBe(0);
    const folder = workFolder();
    const path = join(folder, 'rules.yml');
    writeFileSync(path, readFileSync(ours('deepseek-convert.rules.yml'), 'utf8').replace('sum by (instance, stage)', 'sum by instance')); // prettier-ignore
    expect(check(['check', 'rules', path]).status).not.toBe(0);
  });
});
