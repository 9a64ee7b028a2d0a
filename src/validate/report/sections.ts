import type { AttentionMode, HeadMap, ValidateReport } from '../report.js';
import { Markup, markup, percent, show } from '../../base/html/markup.js';
import type { Section } from '../../base/html/page.js';
import { curves, heatMap, histogram, linearScale, logScale } from './plots.js';
import { numeric, sortable } from '../../base/html/tables.js';

export function layersSection({ layers, gates }: ValidateReport): Section | undefined {
  if (layers.length === 0) return undefined;
  const bound = gates.find(({ id }) => id === 'maxLayerError')?.bound ?? null;
  const own = layers.map((l) => l.teacherForced.update);
  const body = markup`<div class="two">
      <div>
        <h3>Each layer by itself</h3>
        <p class="soft">
          The candidate's layer on the reference's input: its error against what the layer adds to the stream. A broken
          layer stands out here.
        </p>
        ${curves([{ name: "on the reference's input", values: own }], { xTitle: 'layer', yTitle: 'relative error (log)', label: `Error of each layer on the reference's input, largest ${show(Math.max(...own))}`, bound })}
      </div>
      <div>
        <h3>Errors adding up</h3>
        <p class="soft">
          Error of the stream after each layer, against its size: the candidate on its own stream, and on the
          reference's.
        </p>
        ${curves(
          [
            { name: 'free-running', values: layers.map((l) => l.freeRunning.output) },
            { name: "on the reference's input", values: layers.map((l) => l.teacherForced.output) },
          ],
          { xTitle: 'layer', yTitle: 'relative error (log)', label: 'Error of the stream after each layer' },
        )}
      </div>
    </div>
    <details>
      <summary>All ${layers.length} layers as numbers</summary>
      ${sortable(layers, [
        { ...numeric('layer', (l) => l.index) },
        { title: 'name', cell: (l) => markup`<code>${l.name}</code>` },
        { title: 'kind', cell: (l) => l.kind },
        numeric('own error', (l) => l.teacherForced.update),
        numeric('of its output', (l) => l.teacherForced.output),
        numeric('free-running', (l) => l.freeRunning.output),
        numeric('free, of what it adds', (l) => l.freeRunning.update),
      ])}
    </details>`;
  return { id: 'layers', title: 'Layers', body };
}

const modes = [
  ['teacherForced', "reference's input"],
  ['freeRunning', 'free-running'],
] as const;
const measures = [
  ['divergence', 'divergence'],
  ['cosine', '1 - cosine'],
  ['overlap', 'keys not shared'],
] as const;

export function attentionSection({ attention }: ValidateReport, data: Record<string, unknown>): Section | undefined {
  if (!attention) return undefined;
  const heads = Math.max(...attention.teacherForced.divergence.map((row) => row?.length ?? 0));
  const panel = (mode: (typeof modes)[number], measure: (typeof measures)[number]): Markup => {
    const id = `map-${mode[0]}-${measure[0]}`;
    const map = attention[mode[0]][measure[0]];
    const shown: HeadMap =
      measure[0] === 'divergence' ? map : map.map((row) => row?.map((v) => Math.max(0, 1 - v)) ?? null);
    data[id] = {
      row: 'layer',
      column: 'head',
      what: measure[1],
      columns: heads,
      rows: shown.map((row) => row?.map((v) => Number(v.toPrecision(3))) ?? []),
    };
    const flat = shown.flatMap((row): readonly (number | null)[] => row ?? [null]);
    const marked = attention[mode[0]].worst.heads.slice(0, 5).map((h) => [h.layer, h.head] as const);
    return markup`<div class="panel" id="${id}" data-group="map">
      <h3>${titleOf(measure[0])}, ${mode[1]}</h3>
      ${heatMap({
        values: shown,
        columns: heads,
        scale: measure[0] === 'overlap' ? linearScale(0, Math.max(...flat.map((v) => v ?? 0), 0.01)) : logScale(flat),
        xTitle: 'head',
        yTitle: 'layer',
        label: `${titleOf(measure[0])} of each layer and head, ${mode[1]}`,
        marked: flat.some((v) => v !== null && v > 0) ? marked : [],
        data: id,
      })}
      <div class="readout"></div>
    </div>`;
  };
  const tabs = markup`<div class="tabs" hidden>${radio('map-mode', modes)}</div>
    <div class="tabs" hidden>${radio('map-what', measures)}</div>`;
  const summary = modes.map(([key, name]) => ({ name, mode: attention[key] }));
  const row = (what: 'mean' | 'worst', r: { mode: AttentionMode }) => r.mode[what];
  const body = markup`<p class="soft">
      How differently the heads of both models spread their attention over the same text: Jensen-Shannon divergence in
      nats (0: alike, 0.693: nothing in common), the cosine of the two rows, and how many of the eight strongest keys
      they share. The first position, which soaks up attention, is left out. Rings: the five worst heads.
    </p>
    ${layer0(attention.layer0)}
    <div class="two">
      <div>${tabs}${modes.map((mode) => measures.map((measure) => panel(mode, measure)))}</div>
      <div>
        ${sortable(summary, [
          { title: 'mode', cell: (r) => markup`<span class="nw">${r.name}</span>` },
          numeric('divergence', (r) => row('mean', r).divergence),
          numeric('worst 5%', (r) => row('worst', r).divergence),
          numeric('cosine', (r) => row('mean', r).cosine),
          numeric('top-8', (r) => row('mean', r).overlap),
        ])}
        ${sortable(
          attention.teacherForced.worst.heads.slice(0, 12),
          [
            numeric('layer', (h) => h.layer),
            numeric('head', (h) => h.head),
            numeric('divergence', (h) => h.divergence),
            numeric('cosine', (h) => h.cosine),
            numeric('top-8', (h) => h.overlap),
          ],
          "The worst heads, on the reference's input",
        )}
      </div>
    </div>`;
  return { id: 'attention', title: 'Attention patterns', body };
}

const titleOf = (measure: string): string =>
  ({ divergence: 'Jensen-Shannon divergence', cosine: '1 - cosine', overlap: 'Share of the top 8 keys not in common' })[
    measure
  ] ?? measure;

function radio(name: string, choices: readonly (readonly [string, string])[]): readonly Markup[] {
  return choices.map(
    ([value, label], i) =>
      markup`<input
          type="radio"
          name="${name}"
          id="${name}-${value}"
          value="${value}"
          ${i === 0 && new Markup(' checked')}
        /><label for="${name}-${value}">${label}</label>`,
  );
}

function layer0(check: { readonly expected: boolean; readonly difference: number } | null): Markup | undefined {
  if (!check?.expected) return undefined;
  return check.difference === 0
    ? markup`<p>Layer 0 has the reference's attention weights, and its patterns are bit-identical, as they must be.</p>`
    : markup`<p>
        <b class="status fail">Layer 0 differs</b> by ${show(check.difference)} although its attention weights are the
        reference's: the configurations disagree.
      </p>`;
}

export function logitsSection({ logits }: ValidateReport): Section {
  const { kl, flips, nonFinite } = logits;
  const all = { name: 'all', ...logits };
  const quote = (text: string): Markup => markup`<code>${text.replaceAll('\n', '\u21b5')}</code>`;
  const body = markup`<h3>Divergence of predictions</h3>
        <p class="soft">
          KL(reference || candidate) at each position: median ${show(kl.median)}, mean ${show(kl.mean)}, 99th percentile
          ${show(kl.p99)}, largest ${show(kl.max)} nats.
        </p>
        ${histogram(logits.histogram.edges, logits.histogram.counts, { xTitle: 'KL, nats (log)', label: `Histogram of KL divergence, median ${show(kl.median)}` })}
        ${sortable(logits.texts.length > 1 ? [all, ...logits.texts] : logits.texts, [
          { title: 'text', cell: (t) => t.name },
          numeric('positions', (t) => t.tokens),
          numeric('KL', (t) => t.kl.mean),
          numeric('KL p99', (t) => t.kl.p99),
          numeric('perplexity', (t) => t.perplexity.reference),
          numeric('candidate', (t) => t.perplexity.candidate),
          { ...numeric('ratio', (t) => t.perplexity.ratio), cell: (t) => show(t.perplexity.ratio, 4) },
          { ...numeric('top-1', (t) => t.top1), cell: (t) => percent(t.top1) },
        ])}
        <p class="soft">
          The text's own token lost first place at ${percent(flips.rightToWrong)} of the positions and won it at
          ${percent(flips.wrongToRight)}.${
            nonFinite.candidate + nonFinite.reference > 0 &&
            markup` <b
              >Not finite: ${nonFinite.candidate} positions of the candidate, ${nonFinite.reference} of the
              reference.</b
            >`
          }
        </p>
    ${
      logits.worst.length > 0 &&
      markup`<h3>Where the two disagree most</h3>
        ${sortable(logits.worst, [
          numeric('KL', (w) => w.kl),
          { title: 'after', cell: (w) => quote(`\u2026${w.before}`) },
          { title: 'text', cell: (w) => quote(w.actual) },
          { title: 'reference', cell: (w) => quote(w.reference) },
          { title: 'candidate', cell: (w) => quote(w.candidate) },
          { title: 'from', cell: (w) => w.text },
          numeric('position', (w) => w.position),
        ])}`
    }`;
  return { id: 'logits', title: 'Predictions', body };
}
