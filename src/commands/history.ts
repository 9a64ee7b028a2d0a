import { resolve } from 'node:path';
import { formatBytes, writeFileAtomic } from '../base/files.js';
import { text } from '../base/options.js';
import { columns } from '../base/text.js';
import type { HistoryRecord } from './history-file.js';
import { defineCommand } from './types.js';

export const command = defineCommand({
  name: 'history',
  description:
    'Every finished quantize, moe and convert adds a line to deepseek-convert-history.jsonl in the folder that holds its output: command, recipe, hashes of inputs and outputs, what the validation found, and the conversion that its input came from.',
  arguments: { folder: text({ default: '.', value: 'folder', help: 'The folder that holds the outputs.' }) },
  options: { html: text({ value: 'history.html', help: 'Write the table as one HTML file.' }) },
  examples: [['history out', 'What was made there, oldest first.']],
  async run(given, io) {
    const { historyName, readHistory } = await import('./history-file.js');
    const records = await readHistory(resolve(given.folder));
    const heads = ['made', 'id', 'from', 'command', 'output', 'size', 'KL', 'perplexity', 'same choice', 'gates'];
    const rows = records.map(rowOf);
    if (given.html !== undefined) {
      const { markup } = await import('../base/html/markup.js');
      const { page } = await import('../base/html/page.js');
      const { sortable } = await import('../base/html/tables.js');
      const columns = heads.map((title, c) => ({
        title,
        cell: (row: readonly string[]) => row[c]!,
        ...(numbers.includes(title) && { value: (row: readonly string[]) => (row[c] === '' ? null : Number(row[c])) }),
      }));
      const head = markup`<small>deepseek-convert</small>
        <h1>Conversions</h1>
        <p class="soft">${resolve(given.folder)}</p>`;
      await writeFileAtomic(given.html, page('Conversions', markup`${head} ${sortable(rows, columns)}`));
    }
    const none = `No conversions in ${given.folder} (no ${historyName})`;
    return {
      data: { folder: resolve(given.folder), records },
      text: records.length === 0 ? none : columns([heads.map((head) => io.paint.bold(head)), ...rows], 'lllllrrrrl'),
    };
  },
});

/** Columns that sort as numbers. */
const numbers = ['KL', 'perplexity'];

function rowOf({ time, id, parent, command: made, out, bytes, validation }: HistoryRecord): string[] {
  const number = (value: number | undefined): string => (value === undefined ? '' : String(Number(value.toPrecision(4)))); // prettier-ignore
  const verdict = validation === null ? 'not validated' : (validation.skipped ?? (validation.passed ? 'passed' : 'FAILED')); // prettier-ignore
  const top1 = validation?.top1;
  return [
    time.slice(0, 16).replace('T', ' '),
    id,
    parent ?? '',
    made,
    out,
    formatBytes(bytes),
    number(validation?.kl?.mean),
    number(validation?.perplexity?.ratio),
    top1 === undefined ? '' : `${number(100 * top1)}%`,
    verdict,
  ];
}
