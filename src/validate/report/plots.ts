import { Markup, markup, show } from '../../base/html/markup.js';

/**
 * Plots as inline SVG that stretches with the page; all text is HTML beside it, so that it keeps its size on a phone.
 * Colours are classes (style.ts), so that they follow light, dark and print.
 */

/** Positions in percent of the plot's area, from the left or from the bottom. */
interface Tick {
  readonly at: number;
  readonly label: string;
}

function frame(o: {
  readonly body: string;
  readonly box: readonly [number, number];
  readonly x: readonly Tick[];
  readonly y: readonly Tick[];
  readonly xTitle: string;
  readonly yTitle: string;
  readonly label: string;
  readonly style: string;
  readonly classes?: string;
  readonly data?: string;
}): Markup {
  const ticks = (list: readonly Tick[], side: 'left' | 'bottom', name: string) =>
    list.map(({ at, label }) => markup`<span class="${name}" style="${side}:${at.toFixed(2)}%">${label}</span>`);
  return markup`<div class="plot ${o.classes ?? ''}" role="img" aria-label="${o.label}">
    <div class="ytitle">${o.yTitle}</div>
    <div class="area" style="${o.style}" ${new Markup(o.data === undefined ? '' : ` data-plot="${o.data}"`)}>
      <svg viewBox="0 0 ${o.box[0]} ${o.box[1]}" preserveAspectRatio="none" aria-hidden="true">
        ${new Markup(o.body)}
      </svg>
      ${ticks(o.x, 'left', 'xt')}${ticks(o.y, 'bottom', 'yt')}
    </div>
    <div class="xtitle">${o.xTitle}</div>
  </div>`;
}

const n = (value: number): string => String(Math.round(value * 100) / 100);

/** At most `most` of 0..count-1, evenly spaced in steps of 1, 2, 5, 10 ... */
function indexTicks(count: number, most: number): number[] {
  let step = 1;
  for (let i = 0; count / step > most; i++) step = [2, 5, 10][i % 3]! * 10 ** Math.floor(i / 3);
  return Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step);
}

export const heatLevels = 10;

export interface HeatScale {
  /** Value -> level 0 (nothing) to heatLevels - 1; -1: no value. */
  level(value: number | null): number;
  readonly low: string;
  readonly high: string;
}

/** Levels by logarithm, over at most four decades below the largest value; zero has a level of its own. */
export function logScale(values: Iterable<number | null>): HeatScale {
  let [low, high] = [Infinity, 0];
  for (const value of values) {
    if (value === null || !(value > 0)) continue;
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (high === 0) return { level: (value) => (value === null ? -1 : 0), low: '0', high: '0' };
  low = Math.max(low, high / 1e4);
  const span = Math.log(high / low) || 1;
  return {
    level: (value) => {
      if (value === null) return -1;
      if (!(value > 0)) return Number.isNaN(value) ? heatLevels - 1 : 0;
      const at = high === low ? 1 : Math.log(value / low) / span;
      return 1 + Math.min(heatLevels - 2, Math.max(0, Math.floor(at * (heatLevels - 1))));
    },
    low: show(low, 2),
    high: show(high, 2),
  };
}

export function linearScale(low: number, high: number): HeatScale {
  return {
    level: (value) =>
      value === null
        ? -1
        : Math.min(heatLevels - 1, Math.max(0, Math.floor(((value - low) / (high - low || 1)) * heatLevels))),
    low: show(low, 2),
    high: show(high, 2),
  };
}

/** Rows x columns of cells, one path for each level: 60 x 64 cells are about 50 kB. */
export function heatMap(o: {
  readonly values: readonly (readonly number[] | null)[];
  readonly columns: number;
  readonly scale: HeatScale;
  readonly xTitle: string;
  readonly yTitle: string;
  readonly label: string;
  /** Cells with a ring. */
  readonly marked?: readonly (readonly [row: number, column: number])[];
  readonly data?: string;
}): Markup {
  const { values, columns, scale } = o;
  const paths = Array.from({ length: heatLevels + 1 }, () => '');
  values.forEach((row, y) => {
    let x = 0;
    while (x < columns) {
      const level = scale.level(row?.[x] ?? null);
      let end = x + 1;
      while (end < columns && scale.level(row?.[end] ?? null) === level) end++;
      paths[level + 1] += `M${x} ${y}h${end - x}v1h-${end - x}z`;
      x = end;
    }
  });
  const cells = paths.map((d, i) => (d === '' ? '' : `<path class="h${i === 0 ? 'x' : i - 1}" d="${d}"/>`)).join('');
  const rings = (o.marked ?? []).map(([y, x]) => `M${x} ${y}h1v1h-1z`).join('');
  const rows = values.length;
  const middle = (i: number, count: number): number => ((i + 0.5) / count) * 100;
  return markup`${frame({
    body: cells + (rings === '' ? '' : `<path class="ring" d="${rings}"/>`),
    box: [columns, rows],
    x: indexTicks(columns, 8).map((i) => ({ at: middle(i, columns), label: String(i) })),
    y: indexTicks(rows, 12).map((i) => ({ at: 100 - middle(i, rows), label: String(i) })),
    xTitle: o.xTitle,
    yTitle: o.yTitle,
    label: o.label,
    style: `aspect-ratio:${columns}/${rows};max-width:${Math.min(46, Math.max(columns * 2.6, 9))}rem;max-height:${Math.max(rows * 2.6, 3)}rem`,
    classes: 'heat',
    ...(o.data !== undefined && { data: o.data }),
  })}${legend(scale)}`;
}

function legend({ low, high }: HeatScale): Markup {
  const swatches = Array.from({ length: heatLevels }, (_, i) => new Markup(`<i class="b${i}"></i>`));
  return markup`<div class="legend"><span>${low}</span>${swatches}<span>${high}</span></div>`;
}

export interface Series {
  readonly name: string;
  /** Class of colour: s0, s1. */
  readonly values: readonly number[];
}

/** Lines over 0..n-1 with a logarithmic height; zeros lie on the floor. */
export function curves(
  series: readonly Series[],
  o: { readonly xTitle: string; readonly yTitle: string; readonly label: string; readonly bound?: number | null },
): Markup {
  const all = series.flatMap((s) => s.values).filter((v) => v > 0 && Number.isFinite(v));
  const bound = o.bound !== null && o.bound !== undefined && o.bound > 0 ? o.bound : undefined;
  const reach = bound === undefined ? all : [...all, bound];
  const high = reach.length === 0 ? 0 : Math.ceil(Math.log10(Math.max(...reach)) + 0.02);
  const low = reach.length === 0 ? -1 : Math.max(high - 8, Math.floor(Math.log10(Math.min(...reach)) - 0.02));
  const height = (v: number): number => {
    if (!Number.isFinite(v)) return 100;
    return v <= 0 ? 0 : Math.min(100, Math.max(0, ((Math.log10(v) - low) / (high - low)) * 100));
  };
  const count = Math.max(...series.map((s) => s.values.length), 1);
  const at = (i: number): number => (count === 1 ? 50 : 2 + (i / (count - 1)) * 96);
  const decades = Array.from({ length: high - low + 1 }, (_, i) => low + i);
  const grid = decades.map((d) => `M0 ${n(100 - height(10 ** d))}h100`).join('');
  const lines = series.map((s, k) => {
    const points = s.values.map((v, i) => `${n(at(i))} ${n(100 - height(v))}`);
    const dots = points.map((p) => `M${p}h0`).join('');
    return `<path class="line s${k}" d="M${points.join('L')}"/><path class="dots s${k}" d="${dots}"/>`;
  });
  const limit = bound === undefined ? '' : `<path class="bound" d="M0 ${n(100 - height(bound))}h100"/>`;
  const step = Math.max(1, Math.ceil(decades.length / 6));
  const keys = series.map((s, k) => markup`<span><i class="key s${k}"></i>${s.name}</span>`);
  return markup`${frame({
    body: `<path class="grid" d="${grid}"/>${limit}${lines.join('')}`,
    box: [100, 100],
    x: indexTicks(count, 10).map((i) => ({ at: at(i), label: String(i) })),
    y: decades.filter((_, i) => i % step === 0).map((d) => ({ at: height(10 ** d), label: decade(d) })),
    xTitle: o.xTitle,
    yTitle: o.yTitle,
    label: o.label,
    style: 'height:15rem',
  })}
    <div class="keys">
      ${keys}${bound !== undefined && markup`<span><i class="key bound"></i>bound ${show(bound)}</span>`}
    </div>`;
}

const decade = (d: number): string => (d >= -3 && d <= 4 ? String(Number((10 ** d).toPrecision(1))) : `1e${d}`);

/** Bars of counts between logarithmic edges. */
export function histogram(
  edges: readonly number[],
  counts: readonly number[],
  o: { readonly xTitle: string; readonly label: string },
): Markup {
  const used = counts.map((c, i) => (c > 0 ? i : -1)).filter((i) => i >= 0);
  const [from, to] =
    used.length === 0 ? [0, counts.length] : [Math.max(0, used[0]! - 1), Math.min(counts.length, used.at(-1)! + 2)];
  const shown = counts.slice(from, to);
  const most = Math.max(...shown, 1);
  const width = 100 / shown.length;
  const bars = shown
    .map((c, i) => (c === 0 ? '' : `M${n(i * width)} 100v-${n((c / most) * 96)}h${n(width * 0.9)}V100z`))
    .join('');
  const x = edges
    .slice(from, to + 1)
    .map((edge, i) => ({ at: i * width, exponent: Math.log10(edge) }))
    .filter(({ exponent }) => Math.abs(exponent - Math.round(exponent)) < 1e-6)
    .map(({ at, exponent }) => ({ at, label: decade(Math.round(exponent)) }));
  return frame({
    body: `<path class="grid" d="M0 4h100M0 52h100M0 100h100"/><path class="bars" d="${bars}"/>`,
    box: [100, 100],
    x: x.length > 8 ? x.filter((_, i) => i % 2 === 0) : x,
    y: [
      { at: 0, label: '0' },
      { at: 96, label: String(most) },
    ],
    xTitle: o.xTitle,
    yTitle: 'positions',
    label: o.label,
    style: 'height:12rem',
  });
}

/** Bars of shares, one an expert, with a line at the even share. */
export function bars(
  values: readonly number[],
  o: { readonly xTitle: string; readonly yTitle: string; readonly label: string; readonly even: number },
): Markup {
  const most = Math.max(...values, o.even * 1.5);
  const width = 100 / values.length;
  const d = values
    .map((v, i) =>
      v === 0 ? '' : `M${n(i * width + width * 0.06)} 100v-${n((v / most) * 96)}h${n(width * 0.88)}V100z`,
    )
    .join('');
  const even = 100 - (o.even / most) * 96;
  return frame({
    body: `<path class="bars" d="${d}"/><path class="bound" d="M0 ${n(even)}h100"/>`,
    box: [100, 100],
    x: indexTicks(values.length, 8).map((i) => ({ at: (i + 0.5) * width, label: String(i) })),
    y: [
      { at: 0, label: '0' },
      { at: 100 - even, label: `${show(o.even * 100)}%` },
      ...(o.even / most < 0.85 ? [{ at: 96, label: `${show(most * 100)}%` }] : []),
    ],
    xTitle: o.xTitle,
    yTitle: o.yTitle,
    label: o.label,
    style: 'height:8rem',
  });
}
