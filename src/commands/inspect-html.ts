import { basename } from 'node:path';
import { formatBytes } from '../base/files.js';
import { type Markup, markup, show } from '../base/html/markup.js';
import { linkedSections, page, type Section } from '../base/html/page.js';
import { numeric, sortable } from '../base/html/tables.js';
import type { Statistics } from '../arch/statistics.js';
import { diagram } from './inspect-diagram.js';
import type { Seen, Stored } from './inspect-look.js';
import { byKind, outlierChannels } from './inspect-stats.js';
import type { Branch } from './inspect-tree.js';

/** Everything that inspect can show as one page. */
export function inspectPage(seen: Seen, tree: readonly Branch[], statistics: Statistics | undefined): string {
  const { checkpoint, model, stored, types, facts, notes } = seen;
  const name = basename(checkpoint.path);
  const sections: Section[] = [
    { id: 'facts', title: 'What it is', body: factsTable(facts, notes) },
    ...(model ? [{ id: 'architecture', title: 'Architecture', body: markup`<div class="scroll"><pre class="picture">${diagram(model, stored, 72)}</pre></div>` }] : []),
    { id: 'types', title: 'Types', body: typesTable(types) },
    ...(statistics ? statisticsSections(statistics) : []),
    { id: 'tensors', title: 'Tensors', body: markup`<p class="soft">Sizes are those of all repeats together.</p><div class="tree">${tree.map((branch) => branchOf(branch, 0))}</div>` },
  ]; // prettier-ignore
  const main = markup`<small>deepseek-convert inspect</small>
    <h1>${name}</h1>
    <p class="soft">${checkpoint.path}</p>
    ${linkedSections(sections)}`;
  return page(name, main);
}

const factsTable = (facts: Seen['facts'], notes: readonly string[]): Markup =>
  markup`<table class="facts">
      ${facts.map(([name, value]) => markup`<tr><td>${name}</td><td>${value}</td></tr>`)}
    </table>
    ${
      notes.length > 0 &&
      markup`<ul class="found">
        ${notes.map((note) => markup`<li>${note}</li>`)}
      </ul>`
    }`;

function typesTable(types: readonly Stored[]): Markup {
  const total = types.reduce((n, { bytes }) => n + bytes, 0);
  return sortable(types, [
    { title: 'type', cell: (t) => t.type },
    numeric('tensors', (t) => t.tensors),
    { title: 'size', value: (t) => t.bytes, cell: (t) => formatBytes(t.bytes) },
    {
      title: 'share',
      cell: (t) => markup`<i class="bar" style="width:${((100 * t.bytes) / Math.max(total, 1)).toFixed(1)}%"></i>`,
    },
  ]);
}

function statisticsSections({ tensors, skipped }: Statistics): Section[] {
  const channels = outlierChannels(tensors);
  const outliers = sortable(channels.slice(0, 200), [
    { title: 'weights', cell: (c) => markup`<code>${c.name}</code>` },
    { title: 'channel', cell: (c) => `${c.of} ${c.index}` },
    numeric('absmax', (c) => c.absmax),
    numeric('x median', (c) => c.ratio),
  ]);
  const kinds = sortable(byKind(tensors), [
    { title: 'weights', cell: (k) => markup`<code>${k.kind}</code>` },
    numeric('tensors', (k) => k.tensors),
    numeric('mean', (k) => k.mean),
    numeric('std', (k) => k.std),
    numeric('absmax', (k) => k.absmax),
    { title: 'zeros', value: (k) => k.zeros / k.values, cell: (k) => `${show((100 * k.zeros) / k.values, 2)}%` },
    numeric('outliers', (k) => k.outliers),
    numeric('not finite', (k) => k.nonFinite),
  ]);
  const without =
    skipped.length > 0 && markup`<p class="soft">${skipped.length} tensors have no weights to look at.</p>`;
  return [
    { id: 'weights', title: 'Weights', body: markup`${kinds} ${without}` },
    {
      id: 'outliers',
      title: 'Outlier channels',
      body:
        channels.length > 0
          ? markup`<p>Largest magnitude of a channel against that of its tensor's median channel.</p>${outliers}`
          : markup`<p>None has four times the magnitude of its tensor's median channel.</p>`,
    },
  ];
}

/** Open down to the parts of a layer. */
function branchOf({ label, times, bytes, leaf, branches }: Branch, depth: number): Markup {
  const repeated = times > 1 && markup` <span class="soft">x ${times}</span>`;
  const name = markup`<code>${label}</code>${repeated}`;
  const size = markup`<span class="size">${formatBytes(bytes)}</span>`;
  if (leaf) return markup`<div class="leaf">${name} <span class="soft">${leaf.type} [${leaf.shape.join(', ')}]</span> ${size}</div>`; // prettier-ignore
  const open = depth < 2 ? markup`<details open>` : markup`<details>`;
  return markup`${open}<summary>${name} ${size}</summary>${branches.map((branch) => branchOf(branch, depth + 1))}</details>`;
}
