import { stringify } from 'yaml';

/** What an engine calls the things to watch. `undefined`: it does not say. */
interface Metrics {
  readonly port: number;
  readonly path: string;
  /** Finished requests a second. */
  readonly qps: string;
  /** 99th percentile of a request's seconds. */
  readonly p99: string | undefined;
  /** Share of requests that fail. */
  readonly errors: string | undefined;
}

const rate = (metric: string): string => `sum(rate(${metric}[5m]))`;
const quantile = (bucket: string): string => `histogram_quantile(0.99, sum by (le) (rate(${bucket}[5m])))`;
const share = (bad: string, all: string): string => `${rate(bad)} / clamp_min(${rate(all)}, 1e-9)`;

const known: Readonly<Record<string, Metrics>> = {
  vllm: {
    port: 8000,
    path: '/metrics',
    qps: rate('vllm:request_success_total'),
    p99: quantile('vllm:e2e_request_latency_seconds_bucket'),
    errors: share('http_requests_total{job="vllm",status=~"5.."}', 'http_requests_total{job="vllm"}'),
  },
  sglang: {
    port: 30000,
    path: '/metrics',
    qps: rate('sglang:num_requests_total'),
    p99: quantile('sglang:e2e_request_latency_seconds_bucket'),
    errors: share('sglang:num_aborted_requests_total', 'sglang:num_requests_total'),
  },
  triton: {
    port: 8002,
    path: '/metrics',
    qps: rate('nv_inference_request_success'),
    p99: quantile('vllm:e2e_request_latency_seconds_bucket{job="triton"}'),
    errors: `${rate('nv_inference_request_failure')} / clamp_min(${rate('nv_inference_request_success')} + ${rate('nv_inference_request_failure')}, 1e-9)`,
  },
  'llama.cpp': {
    port: 8080,
    path: '/metrics',
    qps: rate('llamacpp:n_decode_total'),
    p99: undefined,
    errors: undefined,
  },
};

/** GPU memory comes from NVIDIA's exporter (dcgm-exporter, port 9400), whatever the engine. */
const gpuMemory = 'sum by (gpu) (DCGM_FI_DEV_FB_USED) * 1048576';

/** prometheus.yml, recording rules and a Grafana dashboard for the engines that are emitted (all, where none is). */
export function prometheus(engines: readonly string[]): Map<string, string> {
  const chosen = Object.keys(known).filter((name) => engines.length === 0 || engines.includes(name));
  const scrape = {
    global: { scrape_interval: '15s', evaluation_interval: '15s' },
    rule_files: ['prometheus-rules.yml'],
    scrape_configs: [
      ...chosen.map((name) => ({
        job_name: name,
        metrics_path: known[name]!.path,
        static_configs: [{ targets: [`localhost:${known[name]!.port}`] }],
      })),
      { job_name: 'dcgm', static_configs: [{ targets: ['localhost:9400'] }] },
    ],
  };
  const silent: string[] = [];
  const rules = chosen.flatMap((name) => {
    const { qps, p99, errors } = known[name]!;
    const labels = { engine: name };
    const optional = (record: string, expr: string | undefined, what: string) => {
      if (expr !== undefined) return [{ record, expr, labels }];
      silent.push(`# warning: ${name} exports no ${what}`);
      return [];
    };
    return [
      { record: 'llm:qps', expr: qps, labels },
      ...optional('llm:latency_seconds:p99', p99, 'request latencies'),
      ...optional('llm:error_rate', errors, 'count of failed requests'),
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
