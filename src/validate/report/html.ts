import type { GateResult, ModelFacts, ValidateReport } from '../report.js';
import { type Markup, markup, percent, show } from '../../base/html/markup.js';
import { linkedSections, page, type Section } from '../../base/html/page.js';
import { attentionSection, layersSection, logitsSection } from './sections.js';
import { diversitySection, routingSection, settingsSection, weightsSection } from './sections-more.js';

/** The report as one HTML file. */
export function toHtml(report: ValidateReport): string {
  const data: Record<string, unknown> = {};
  const sections = [
    { id: 'gates', title: 'Gates', body: gatesTable(report.gates) },
    layersSection(report),
    attentionSection(report, data),
    logitsSection(report),
    routingSection(report, data),
    weightsSection(report),
    diversitySection(report),
    settingsSection(report),
  ].filter((section): section is Section => section !== undefined);
  const failed = report.gates.filter(({ status }) => status === 'fail');
  const title = `${report.passed ? 'Passed' : 'Failed'}: ${baseName(report.candidate.path)} against ${baseName(report.reference.path)}`;
  const main = markup`<small>deepseek-convert validate</small>
    <h1>${baseName(report.candidate.path)} <span class="soft">against</span> ${baseName(report.reference.path)}</h1>
    <p class="soft">${describe(report.candidate)} <br />against ${describe(report.reference)}</p>
    ${verdict(report, failed)} ${tiles(report)}
    ${
      report.diagnosis.length > 0 &&
      markup`<ul class="found">
        ${report.diagnosis.map((line) => markup`<li>${line}</li>`)}
      </ul>`
    }
    ${linkedSections(sections)}`;
  return page(title, main, data);
}

const baseName = (path: string): string => path.replace(/\/+$/, '').split('/').at(-1) ?? path;

function describe(model: ModelFacts): string {
  const experts = model.experts && `${model.experts.total} experts, ${model.experts.active} active`;
  const shared = model.experts && model.experts.shared > 0 ? `, ${model.experts.shared} shared` : '';
  const bits = `${show((model.storedBytes * 8) / model.parameters)} bits a weight`;
  const parts = [model.modelType, `${show(model.parameters / 1e6, 4)} M parameters`, `${model.layers} layers`];
  return [...parts, experts && experts + shared, model.quantization, bits].filter(Boolean).join(', ');
}

function verdict(report: ValidateReport, failed: readonly GateResult[]): Markup {
  const checked = report.gates.filter(({ status }) => status === 'pass' || status === 'fail').length;
  return report.passed
    ? markup`<div class="verdict pass">
        <b>Passed</b><span>all ${checked} gates hold (bounds for ${report.profile} models)</span>
      </div>`
    : markup`<div class="verdict fail">
        <b>Failed</b><span>${failed.length} of ${checked} gates: ${failed.map((g, i) => markup`${i > 0 && ', '}<span class="flag">${g.flag}</span>`)}</span>
      </div>`;
}

function tiles(report: ValidateReport): Markup {
  const { logits, attention, diversity } = report;
  const failed = (id: string): boolean => report.gates.some((g) => g.id === id && g.status === 'fail');
  const interval = (i: { low: number; high: number }): string => `95%: ${show(i.low)} to ${show(i.high)}`;
  const tile = (ids: readonly string[], value: string, name: string, more = '') =>
    markup`<div class="tile${ids.some(failed) && ' fail'}"><b>${value}</b><span>${name}</span><span>${more}</span></div>`;
  const ratio = logits.perplexity;
  const layer = report.gates.find(({ id }) => id === 'maxLayerError');
  return markup`<div class="tiles">
    ${tile(['maxKl', 'maxKlP99'], show(logits.kl.mean), 'mean KL, nats', interval(logits.intervals.kl))}
    ${tile(['maxPplRatio'], show(ratio.ratio, 4), 'perplexity ratio', `keeps ${percent(Math.min(1, 1 / ratio.ratio))}; ${show(ratio.reference)} to ${show(ratio.candidate)}; ${interval(logits.intervals.ratio)}`)}
    ${tile(['minTop1'], percent(logits.top1), 'same first choice', `${show(logits.tokens)} positions`)}
    ${layer && layer.value !== null && tile(['maxLayerError'], show(layer.value), 'worst layer error', layer.where ?? '')}
    ${attention && tile(['maxAttentionJs', 'maxHeadJs', 'maxLayer0Change'], show(attention.teacherForced.worst.divergence), 'attention divergence', `worst 5% of heads; mean ${show(attention.teacherForced.mean.divergence)}`)}
    ${diversity && tile(['minDistinctRatio', 'maxRepIncrease'], show(diversity.distinctRatio.value), 'distinct-2 ratio', interval(diversity.distinctRatio.interval))}
  </div>`;
}

const words = { pass: 'pass', fail: 'FAIL', off: 'no bound', skipped: 'n/a' } as const;

function gatesTable(gates: readonly GateResult[]): Markup {
  const order = ['fail', 'pass', 'off', 'skipped'];
  const sorted = gates.toSorted((a, b) => order.indexOf(a.status) - order.indexOf(b.status));
  const row = (g: GateResult): Markup => {
    const sign = g.direction === 'max' ? '\u2264' : '\u2265';
    const where = g.where ?? g.reason ?? '';
    const remedy = g.remedy && markup`<p class="remedy"><b>Likely remedy:</b> ${g.remedy}.</p>`;
    return markup`<tr class="${g.status}">
      <td><span class="status ${g.status}">${words[g.status]}</span></td>
      <td>
        <b>${g.name}</b>: ${g.metric}<br /><small>${g.meaning} <code>${g.flag}</code></small
        >${remedy}
      </td>
      <td class="num" data-name="value">${g.value === null && g.status !== 'fail' ? '' : show(g.value ?? NaN)}</td>
      <td class="num" data-name="bound">${g.bound === null ? '' : `${sign} ${show(g.bound)}`}</td>
      <td>${where}</td>
    </tr>`;
  };
  return markup`<div class="scroll">
    <table class="cards">
      <thead>
        <tr>
          <th>verdict</th>
          <th>what</th>
          <th class="num">value</th>
          <th class="num">bound</th>
          <th>where</th>
        </tr>
      </thead>
      <tbody>
        ${sorted.map(row)}
      </tbody>
    </table>
  </div>`;
}
