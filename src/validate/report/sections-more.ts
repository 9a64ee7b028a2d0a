import type { RoutingLayer, ValidateReport } from '../report.js';
import { diffWords, type Span } from './diff.js';
import { type Markup, markup, show } from '../../base/html/markup.js';
import type { Section } from '../../base/html/page.js';
import { bars, heatMap, linearScale } from './plots.js';
import { numeric, sortable } from '../../base/html/tables.js';

/** So many layers of bars are readable; beyond, a map shows all of them and bars the worst ones. */
const mostBars = 6;

export function routingSection({ routing }: ValidateReport, data: Record<string, unknown>): Section | undefined {
  if (!routing) return undefined;
  const { layers } = routing;
  const experts = Math.max(...layers.map((l) => l.experts));
  const worst = layers.toSorted((a, b) => b.maxVio - a.maxVio).slice(0, mostBars);
  const shown = layers.length <= mostBars ? layers : worst.toSorted((a, b) => a.layer - b.layer);
  const one = (l: RoutingLayer): Markup =>
    markup`<div>
      <h3>Layer ${l.layer}</h3>
      ${bars(l.load, { xTitle: 'expert', yTitle: 'share of slots', label: `Load of the experts of layer ${l.layer}, MaxVio ${show(l.maxVio)}`, even: 1 / l.experts })}
    </div>`;
  const map = (): Markup => {
    const values = layers.map((l) => l.load.map((share) => share * l.experts));
    data['load'] = {
      row: 'row',
      column: 'expert',
      what: 'load against the even share',
      columns: experts,
      rows: values.map((row) => row.map((v) => Number(v.toPrecision(3)))),
    };
    return markup`<div class="panel" id="load" data-group="load">
      <h3>Load of all layers and experts, 1 = even</h3>
      ${heatMap({ values, columns: experts, scale: linearScale(0, Math.max(...values.flat(), 1)), xTitle: 'expert', yTitle: 'MoE layer', label: 'Load of each expert of each layer against the even share', data: 'load' })}
      <div class="readout"></div>
    </div>`;
  };
  const agree = layers.some((l) => l.agreement !== undefined);
  const body = markup`<p class="soft">Share of the routed slots that each expert of the candidate got on these texts; dashed: the even share. Mean MaxVio ${show(routing.mean.maxVio)}, mean entropy ${show(routing.mean.entropy)} of 1, ${routing.dead} of ${routing.experts} experts dead.</p>
${layers.length > mostBars && map()}
${layers.length > mostBars && markup`<p class="soft">The ${mostBars} least balanced layers:</p>`}<div class="two">${shown.map(one)}</div>
<details${layers.length <= mostBars && ' open'}><summary>All ${layers.length} MoE layers as numbers</summary>${sortable(
    layers,
    [
      numeric('layer', (l) => l.layer),
      numeric('experts', (l) => l.experts),
      numeric('active', (l) => l.active),
      numeric('MaxVio', (l) => l.maxVio),
      numeric('entropy', (l) => l.entropy),
      numeric('dead', (l) => l.dead.length),
      ...(agree
        ? [
            numeric('same experts', (l: RoutingLayer) => l.agreement?.teacherForced),
            numeric('free-running', (l: RoutingLayer) => l.agreement?.freeRunning),
            numeric('MaxVio of the reference', (l: RoutingLayer) => l.reference?.maxVio),
          ]
        : []),
    ],
  )}</details>`;
  return { id: 'routing', title: 'Experts', body };
}

export function weightsSection({ weights }: ValidateReport): Section | undefined {
  if (!weights || weights.compared === 0) return undefined;
  const alone = weights.unmatched.reference + weights.unmatched.candidate;
  const body = markup`<p class="soft">
      ${weights.compared} tensors have the same name and shape in both; ${weights.identical} of them are
      bit-identical.${alone > 0 && ` ${weights.unmatched.reference} of the reference and ${weights.unmatched.candidate} of the candidate have no partner.`}
      Error: |W' - W| / |W|.
    </p>
    <div class="two">
      ${sortable(
        weights.kinds,
        [
          { title: 'kind', cell: (k) => markup`<code>${k.kind}</code>` },
          numeric('tensors', (k) => k.count),
          numeric('mean error', (k) => k.mean),
          numeric('largest', (k) => k.max),
        ],
        'By kind',
      )}${
        weights.worst.length > 0 &&
        sortable(
          weights.worst.slice(0, 20),
          [
            { title: 'tensor', cell: (w) => markup`<code>${w.name}</code>` },
            numeric('error', (w) => w.error),
            numeric('its kind', (w) => w.peers),
          ],
          'Furthest from their kind',
        )
      }
    </div>`;
  return { id: 'weights', title: 'Weights', body };
}

/** Spaces stay outside the mark: at the end of a line it would stick out. */
const marked = (spans: readonly Span[]): Markup[] =>
  spans.map(({ text, same }) => {
    const words = text.trim();
    if (same || words === '') return markup`${text}`;
    const at = text.indexOf(words);
    return markup`${text.slice(0, at)}<mark>${words}</mark>${text.slice(at + words.length)}`;
  });

/** rep-4 by quarter of the long generations. */
function stabilityTable({ stability: s }: ValidateReport): Markup | undefined {
  if (!s) return undefined;
  const rows = s.quarters.reference.map((reference, i) => {
    return { quarter: `${i + 1}.`, reference, candidate: s.quarters.candidate[i]! };
  });
  const { value, interval } = s.increase;
  return markup`<h3>Long generations</h3>
    <p class="soft">
      rep-4 within each quarter of ${s.prompts} generations of ${s.newTokens} tokens. Collapsed (above 0.8 in the last
      quarter): ${s.collapsed.candidate}, of the reference ${s.collapsed.reference}. Last quarter: ${show(value)} more
      than the reference (95%: ${show(interval.low)} to ${show(interval.high)}).
    </p>
    ${sortable(rows, [
      { title: 'quarter', cell: (r) => r.quarter },
      numeric('reference', (r) => r.reference),
      numeric('candidate', (r) => r.candidate),
    ])}`;
}

export function diversitySection(report: ValidateReport): Section | undefined {
  const { diversity: d } = report;
  const long = stabilityTable(report);
  if (!d && long) return { id: 'generations', title: 'Generations', body: long };
  if (!d) return undefined;
  const s = d.settings;
  const single = [
    { metric: 'EAD', reference: d.reference.ead, candidate: d.candidate.ead },
    { metric: 'self-BLEU', reference: d.reference.selfBleu, candidate: d.candidate.selfBleu },
    { metric: 'mean length, tokens', reference: d.reference.meanLength, candidate: d.candidate.meanLength },
    { metric: 'empty', reference: d.reference.empty, candidate: d.candidate.empty },
  ].map((row) => ({ ...row, difference: row.candidate - row.reference, interval: undefined }));
  const pairs = d.pairs.map(({ prompt, reference, candidate }, i) => {
    const { a, b } = diffWords(reference, candidate);
    const same = reference === candidate;
    return markup`<div class="pair">
      <h3>${i + 1}. ${prompt}</h3>
      ${
        same
          ? markup`<div class="gen">
              <h4>both, word for word</h4>
              <div class="words">${reference}</div>
            </div>`
          : markup`<div class="two">
              <div class="gen">
                <h4>reference</h4>
                <div class="words">${marked(a)}</div>
              </div>
              <div class="gen">
                <h4>candidate</h4>
                <div class="words">${marked(b)}</div>
              </div>
            </div>`
      }
    </div>`;
  });
  const body = markup`<p class="soft">
      ${s.prompts} prompts, up to ${s.newTokens} new tokens each, temperature ${s.temperature}, the same seed
      (${s.seed}) for both. distinct-n: share of n-grams that are unique; rep-n: share said before in the same text;
      intervals: 95%, paired bootstrap over prompts. A damaged model can be diverse: read this beside the divergence
      above.
    </p>
    ${sortable(
      [...d.differences, ...single],
      [
        { title: 'metric', cell: (r) => markup`<span class="nw">${r.metric}</span>` },
        numeric('reference', (r) => r.reference),
        numeric('candidate', (r) => r.candidate),
        numeric('difference', (r) => r.difference),
        {
          title: '95%',
          cell: (r) =>
            markup`<span class="nw">${r.interval && `${show(r.interval.low)} to ${show(r.interval.high)}`}</span>`,
        },
      ],
    )}
    <h3>Generations</h3>
    ${pairs.slice(0, 4)}${
      pairs.length > 4 &&
      markup`<details>
        <summary>${pairs.length - 4} more</summary>
        ${pairs.slice(4)}
      </details>`
    }${long}`;
  return { id: 'generations', title: 'Generations', body };
}

export function settingsSection(report: ValidateReport): Section {
  const { settings: s, reference: r, candidate: c } = report;
  const facts: (readonly [string, string])[] = [
    ['reference', `${r.path} (${r.format}, ${r.fingerprint.slice(0, 16)})`],
    ['candidate', `${c.path} (${c.format}, ${c.fingerprint.slice(0, 16)})`],
    ['tool', `${s.tool}, computed in ${s.dtype} on ${s.device}`],
    ['tokens', `${s.tokens} in ${s.samples} windows of up to ${s.seqLen}; seed ${s.seed}, ${s.bootstrap} resamples`],
    ...s.texts.map((t): readonly [string, string] => [
      'text',
      `${t.name}: ${t.windows} windows, ${t.tokens} tokens, SHA-256 ${t.sha256.slice(0, 16)}`,
    ]),
    ['report', `${report.schema} version ${report.version}, bounds for ${report.profile} models`],
    ...report.skipped.map((p): readonly [string, string] => ['left out', `${p.part}: ${p.reason}`]),
    ...report.notes.map((note): readonly [string, string] => ['note', note]),
  ];
  const tokenizer =
    report.tokenizer &&
    report.tokenizer.mismatches.length > 0 &&
    markup`<h3>Texts encoded differently</h3>
      ${sortable(report.tokenizer.mismatches, [
        { title: 'text', cell: (m) => m.text },
        numeric('at token', (m) => m.at),
        { title: 'reference', cell: (m) => markup`<code>${m.reference}</code>` },
        { title: 'candidate', cell: (m) => markup`<code>${m.candidate}</code>` },
      ])}`;
  const body = markup`<div class="scroll">
      <table class="facts">
        <tbody>
          ${facts.map(
            ([name, value]) =>
              markup`<tr>
                <td>${name}</td>
                <td class="mono">${value}</td>
              </tr>`,
          )}
        </tbody>
      </table>
    </div>
    ${tokenizer}`;
  return { id: 'settings', title: 'How it was measured', body };
}
