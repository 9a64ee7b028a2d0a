import { writeFileAtomic } from '../base/files.js';
import type { HealthSummary } from '../tune/health.js';
import type { QatResult } from './options.js';

interface Line {
  readonly name: string;
  readonly color: string;
  readonly points: readonly (readonly [x: number, y: number])[];
}

const escape = (text: string): string => text.replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);

/** A plot with a logarithmic y axis. Values that are not positive are left out. */
function plot(title: string, lines: readonly Line[]): string {
  const [width, height, left, bottom] = [760, 260, 64, 28];
  const drawn = lines.map((line) => ({ ...line, points: line.points.filter(([, y]) => y > 0 && Number.isFinite(y)) }));
  const all = drawn.flatMap(({ points }) => points);
  if (all.length === 0) return '';
  const logs = all.map(([, y]) => Math.log10(y));
  const low = Math.min(...logs) - 0.05;
  const high = Math.max(...logs) + 0.05;
  const last = Math.max(1, ...all.map(([x]) => x));
  const at = (x: number, y: number) =>
    `${(left + (x / last) * (width - left - 12)).toFixed(1)},${(12 + ((high - y) / (high - low)) * (height - bottom - 12)).toFixed(1)}`;
  const ticks = [0, 0.25, 0.5, 0.75, 1].map((part) => {
    const y = low + part * (high - low);
    const [, py] = at(0, y).split(',');
    return `<line x1="${left}" x2="${width - 12}" y1="${py}" y2="${py}" stroke="#ddd"/><text x="${left - 6}" y="${py}" dy="4" text-anchor="end">${(10 ** y).toPrecision(3)}</text>`;
  });
  const paths = drawn.map(({ points, color }) => {
    const path = points.map(([x, y]) => at(x, Math.log10(y))).join(' ');
    return `<polyline fill="none" stroke="${color}" stroke-width="1.4" points="${path}"/>`;
  });
  const legend = drawn
    .map(({ name, color }) => `<span style="color:${color}">&#9632; ${escape(name)}</span>`)
    .join(' ');
  return `<h2>${escape(title)}</h2><p>${legend}</p><svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${escape(title)}">${ticks.join('')}${paths.join('')}<text x="${width - 12}" y="${height - 8}" text-anchor="end">step ${last}</text></svg>`;
}

function healthTable(name: string, health: HealthSummary): string {
  const { steps, skipped, clippedShare, medianNorm, largestNorm, alarms } = health;
  const said = alarms.map(({ kind, step, text }) => `step ${step}, ${kind}: ${text}`).join('; ') || 'none';
  return `<tr><td>${escape(name)}</td><td>${steps}</td><td>${skipped}</td><td>${(100 * clippedShare).toFixed(0)}%</td><td>${medianNorm.toPrecision(3)}</td><td>${largestNorm.toPrecision(3)}</td><td>${escape(said)}</td></tr>`;
}

type Trained = Pick<QatResult, 'out' | 'blocks' | 'endToEnd' | 'calibration'>;

/** Losses and gradients of a training run as one self-contained page. */
export function trainingReport({ out, blocks, endToEnd, calibration }: Trained): string {
  const steps = endToEnd?.steps ?? [];
  const over = (pick: (step: (typeof steps)[number]) => number | null) =>
    steps.flatMap((step, i) => (pick(step) === null ? [] : [[i + 1, pick(step)!] as const]));
  const judged = (endToEnd?.judgements ?? []).map(({ step, loss }) => [step, loss] as const);
  const rows = [
    ...blocks.map(({ block, health }) => healthTable(`block ${block}`, health)),
    ...(endToEnd ? [healthTable('the whole model', endToEnd.health)] : []),
  ];
  const blockNorms = Object.entries(endToEnd?.health.blocks ?? {}).map(([block, norm]) => [Number(block), norm] as const); // prettier-ignore
  return `<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Training of ${escape(out)}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:820px;margin:2em auto;padding:0 1em;color:#222}svg{width:100%;font-size:11px}table{border-collapse:collapse;width:100%}td,th{padding:.2em .6em;border-bottom:1px solid #ddd;text-align:left}</style></head><body>
<h1>Training of ${escape(out)}</h1><p>Text: ${escape(calibration)}.</p>
${plot('Relative error of each block on held-out windows', [
  { name: 'before', color: '#b33', points: blocks.map(({ block, before }) => [block, before]) },
  { name: 'after', color: '#27c', points: blocks.map(({ block, after }) => [block, after]) },
])}
${plot('Loss of the whole model', [
  { name: 'training', color: '#999', points: over(({ loss }) => loss) },
  { name: 'held-out windows', color: '#27c', points: judged },
])}
${plot('Norm of the gradient before clipping', [{ name: 'all parameters', color: '#27c', points: over(({ norm }) => norm) }])}
${plot('Median norm of each block', [{ name: 'by block', color: '#27c', points: blockNorms.filter(([block]) => block >= 0) }])}
<h2>Gradients</h2><table><tr><th></th><th>steps</th><th>left out</th><th>clipped</th><th>median norm</th><th>largest</th><th>alarms</th></tr>${rows.join('')}</table>
</body></html>
`;
}

export const writeTrainingReport = (path: string, result: Trained): Promise<void> =>
  writeFileAtomic(path, trainingReport(result));
