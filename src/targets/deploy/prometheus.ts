import { createRequire } from 'node:module';
import type yaml from 'yaml';

const require = createRequire(import.meta.url);

/** What an engine calls the things to watch. `undefined`: it does not say. */
interface Metrics {
  readonly port: number;
  /** Finished requests a second. */
  readonly qps: string | undefined;
  /** Generated tokens a second. */
  readonly tokens: string;
  /** 99th percentile of a request's seconds. */
  readonly p99: string | undefined;
  /** Share of requests that fail. */
  readonly errors: string | undefined;
}

const rate = (metric: string, job: string, more = ''): string => `sum(rate(${metric}{job="${job}"${more}}[5m]))`;
const p99 = (histogram: string, job: string): string => `histogram_quantile(0.99, sum by (le) (rate(${histogram}_bucket{job="${job}"}[5m])))`; // prettier-ignore
const share = (bad: string, all: string): string => `${bad} / clamp_min(${all}, 1e-9)`;

/**
 * Names of metrics as they stand in:
 * - vllm-project/vllm: vllm/v1/metrics/loggers.py (the client library adds `_total` to counters), and
 *   vllm/entrypoints/serve/instrumentator/metrics.py (prometheus-fastapi-instrumentator with its defaults:
 *   http_requests_total by handler, method and status 2xx ... 5xx);
 * - sgl-project/sglang: TokenizerMetricsCollector of python/sglang/srt/metrics/collector.py (with --enable-metrics);
 * - triton-inference-server: docs/user_guide/metrics.md of server; src/utils/metrics.py of vllm_backend, which reports
 *   only with REPORT_CUSTOM_METRICS in config.pbtxt (its README, "Triton Metrics");
 * - ggml-org/llama.cpp: tools/server/README.md, GET /metrics (with --metrics). It counts calls of llama_decode, a step
 *   of all slots, but no requests.
 * - NVIDIA/dcgm-exporter: etc/default-counters.csv (DCGM_FI_DEV_FB_USED in MiB, port 9400).
 */
const known: Readonly<Record<string, Metrics>> = {
  vllm: {
    port: 8000,
    qps: rate('vllm:request_success_total', 'vllm'),
    tokens: rate('vllm:generation_tokens_total', 'vllm'),
    p99: p99('vllm:e2e_request_latency_seconds', 'vllm'),
    errors: share(rate('http_requests_total', 'vllm', ',status="5xx"'), rate('http_requests_total', 'vllm')),
  },
  sglang: {
    port: 30000,
    qps: rate('sglang:num_requests_total', 'sglang'),
    tokens: rate('sglang:generation_tokens_total', 'sglang'),
    p99: p99('sglang:e2e_request_latency_seconds', 'sglang'),
    errors: share(rate('sglang:num_aborted_requests_total', 'sglang'), rate('sglang:num_requests_total', 'sglang')),
  },
  triton: {
    port: 8002,
    qps: rate('nv_inference_request_success', 'triton'),
    tokens: rate('vllm:generation_tokens_total', 'triton'),
    p99: p99('vllm:e2e_request_latency_seconds', 'triton'),
    errors: share(
      rate('nv_inference_request_failure', 'triton'),
      `(${rate('nv_inference_request_success', 'triton')} + ${rate('nv_inference_request_failure', 'triton')})`,
    ),
  },
  'llama.cpp': {
    port: 8080,
    qps: undefined,
    tokens: rate('llamacpp:tokens_predicted_total', 'llama.cpp'),
    p99: undefined,
    errors: undefined,
  },
};

/** GPU memory comes from NVIDIA's exporter (dcgm-exporter, port 9400), whatever the engine. */
const gpuMemory = 'sum by (gpu) (DCGM_FI_DEV_FB_USED) * 1048576';

/** prometheus.yml, recording rules and a Grafana dashboard for the engines that are emitted (all, where none is). */
export function prometheus(engines: readonly string[]): Map<string, string> {
  // Here, not at the top: quantize starts in half the time.
  const { stringify } = require('yaml') as typeof yaml;
  const chosen = Object.keys(known).filter((name) => engines.length === 0 || engines.includes(name));
  const scrape = {
    global: { scrape_interval: '15s', evaluation_interval: '15s' },
    rule_files: ['prometheus-rules.yml'],
    scrape_configs: [
      ...chosen.map((name) => ({
        job_name: name,
        static_configs: [{ targets: [`localhost:${known[name]!.port}`] }],
      })),
      { job_name: 'dcgm', static_configs: [{ targets: ['localhost:9400'] }] },
    ],
  };
  const silent: string[] = [];
  const rules = chosen.flatMap((name) => {
    const { qps, tokens, p99, errors } = known[name]!;
    const rule = (record: string, expr: string | undefined, what: string) => {
      if (expr !== undefined) return [{ record, expr, labels: { engine: name } }];
      silent.push(`# warning: ${name} exports no ${what}`);
      return [];
    };
    return [
      ...rule('llm:qps', qps, 'count of requests'),
      ...rule('llm:tokens_per_second', tokens, 'count of tokens'),
      ...rule('llm:latency_seconds:p99', p99, 'request latencies'),
      ...rule('llm:error_rate', errors, 'count of failed requests'),
    ];
  });
  const groups = { groups: [{ name: 'llm', rules: [...rules, { record: 'llm:gpu_memory_bytes', expr: gpuMemory }] }] };
  return new Map([
    ['prometheus.yml', stringify(scrape)],
    ['prometheus-rules.yml', [...silent, stringify(groups)].join('\n')],
    ['grafana-dashboard.json', `${JSON.stringify(dashboard(), null, 2)}\n`],
  ]);
}

function dashboard(): object {
  const panels: [title: string, expr: string, unit: string, legend: string][] = [
    ['Requests a second', 'llm:qps', 'reqps', '{{engine}}'],
    ['Tokens a second', 'llm:tokens_per_second', 'short', '{{engine}}'],
    ['Latency, 99th percentile', 'llm:latency_seconds:p99', 's', '{{engine}}'],
    ['GPU memory', 'llm:gpu_memory_bytes', 'bytes', 'GPU {{gpu}}'],
    ['Error rate', 'llm:error_rate', 'percentunit', '{{engine}}'],
  ];
  return {
    title: 'Language models',
    uid: 'deepseek-convert',
    schemaVersion: 39,
    time: { from: 'now-1h', to: 'now' },
    refresh: '15s',
    panels: panels.map(([title, expr, unit, legendFormat], i) => ({
      ...{ id: i + 1, title, type: 'timeseries', datasource: { type: 'prometheus' } },
      gridPos: { h: 8, w: 12, x: 12 * (i % 2), y: 8 * Math.floor(i / 2) },
      fieldConfig: { defaults: { unit }, overrides: [] },
      targets: [{ refId: 'A', expr, legendFormat }],
    })),
  };
}
