import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { toHtml } from '../../src/validate/report/html.js';
import { Browser, findBrowser } from '../support/browser.js';
import { syntheticReport } from '../unit/validate/synthetic.js';

const path = findBrowser();
if (path === undefined) console.log('No Chromium here: the HTML report is not opened in a browser.');

describe.skipIf(path === undefined)('the HTML report of 60 layers, 64 heads and 64 experts in Chromium', () => {
  let browser: Browser;
  let folder: string;
  let url: string;
  const html = toHtml(syntheticReport({ layers: 60, heads: 64, experts: 64, broken: 17 }));
  beforeAll(async () => {
    folder = mkdtempSync(join(tmpdir(), 'report-'));
    writeFileSync(join(folder, 'report.html'), html);
    url = pathToFileURL(join(folder, 'report.html')).href;
    browser = await Browser.start(path!);
  });
  afterAll(async () => {
    await browser.close();
    rmSync(folder, { recursive: true });
  });

  it('is under 2 MB', () => expect(Buffer.byteLength(html)).toBeLessThan(2e6));

  const views: [string, View][] = [
    ['phone', { width: 390, height: 844, mobile: true }],
    ['phone, dark', { width: 390, height: 844, mobile: true, dark: true }],
    ['desktop', { width: 1280, height: 900 }],
    ['desktop, dark', { width: 1280, height: 900, dark: true }],
  ];
  it.each(views)('%s: no complaint, no request, everything visible and nothing cut off', async (name, view) => {
    const { complaints, requests } = await browser.open(url, view);
    expect(complaints).toEqual([]);
    expect(requests).toEqual([url]);
    const page = await browser.evaluate<Page>(measure);
    // Six maps of heads, the histogram, curves of layers, maps of experts.
    expect(page.plots.length).toBeGreaterThanOrEqual(6 + 1 + 1 + 1);
    for (const plot of page.plots) {
      expect(plot.width, plot.label).toBeGreaterThan(100);
      expect(plot.height, plot.label).toBeGreaterThan(4);
      expect(plot.marks, plot.label).toBeGreaterThan(0);
    }
    // The page itself never scrolls sideways; wide tables and maps do within their frames.
    expect(page.scrollWidth).toBeLessThanOrEqual(view.width);
    expect(page.smallestText).toBeGreaterThanOrEqual(view.mobile ? 9 : 8);
    expect(page.background).toMatch(view.dark ? /rgb\((\d|[1-5]\d), / : /rgb\(2[345]\d, /);
    // For people: REPORT_SCREENSHOTS=folder npx vitest run test/validate/browser.test.ts
    const folder = process.env.REPORT_SCREENSHOTS;
    if (folder === undefined) return;
    mkdirSync(folder, { recursive: true });
    for (let i = 0; i < 6; i++)
      writeFileSync(join(folder, `${name} ${i}.png`), await browser.screenshot(i * 1400, 1400));
  });

  it('sorts a table by the column that is clicked, both ways', async () => {
    const { complaints } = await browser.open(url, { width: 1280, height: 900 });
    const sorted = await browser.evaluate<{ up: number[]; down: number[] }>(sortTwice);
    expect(sorted.up.length).toBeGreaterThan(5);
    expect(sorted.up).toEqual(sorted.up.toSorted((a, b) => a - b));
    expect(sorted.down).toEqual(sorted.down.toSorted((a, b) => b - a));
    expect(sorted.up).not.toEqual(sorted.down);
    expect(complaints).toEqual([]);
  });

  it('says what fails, and where, on the first screen', async () => {
    await browser.open(url, { width: 390, height: 844, mobile: true });
    const first = await browser.evaluate<string>(
      `[...document.querySelectorAll('h1, h2, p, li, td, strong, b')].filter((e) => e.getBoundingClientRect().top < 844).map((e) => e.textContent).join(' ')`,
    );
    expect(first).toMatch(/fail/i);
    expect(first).toContain('Layer 17');
  });
});

interface View {
  readonly width: number;
  readonly height: number;
  readonly mobile?: boolean;
  readonly dark?: boolean;
}

interface Page {
  readonly plots: readonly { label: string; width: number; height: number; marks: number }[];
  readonly scrollWidth: number;
  readonly smallestText: number;
  readonly background: string;
}

/** Opens what is folded, goes through all tabs, and measures every plot while it is shown. */
const measure = `(() => {
  for (const details of document.querySelectorAll('details')) details.open = true;
  const plots = new Map([...document.querySelectorAll('svg')].map((e) => [e, undefined]));
  const look = () => {
    for (const [e] of plots) {
      const box = e.getBoundingClientRect();
      if (box.width === 0) continue;
      const marks = [...e.querySelectorAll('path')].reduce((n, path) => n + (path.getAttribute('d').match(/[MLhvHV]/g) ?? []).length, 0);
      plots.set(e, { width: box.width, height: box.height, marks: marks + e.querySelectorAll('rect, circle, line, polyline').length });
    }
  };
  const scrollWidth = () => document.documentElement.scrollWidth;
  let widest = 0;
  const groups = [...new Set([...document.querySelectorAll('.tabs input')].map((i) => i.name))].map((name) => [...document.querySelectorAll('input[name="' + name + '"]')]);
  const walk = ([group, ...rest]) => {
    if (!group) { look(); widest = Math.max(widest, scrollWidth()); return; }
    for (const input of group) { input.click(); walk(rest); }
  };
  walk(groups);
  for (const group of groups) group[0].click();
  const texts = [...document.querySelectorAll('td, p, th, li')].filter((e) => e.getBoundingClientRect().width > 0);
  return {
    plots: [...plots].map(([e, found]) => ({ label: e.closest('[aria-label]')?.getAttribute('aria-label') ?? e.closest('.panel')?.id ?? '', width: 0, height: 0, marks: 0, ...found })),
    scrollWidth: widest,
    smallestText: Math.min(...texts.map((e) => parseFloat(getComputedStyle(e).fontSize))),
    background: getComputedStyle(document.documentElement).backgroundColor + ' ' + getComputedStyle(document.body).backgroundColor,
  };
})()`;

const sortTwice = `(() => {
  const table = [...document.querySelectorAll('table.sort')].find((t) => t.tBodies[0].rows.length > 5 && t.querySelector('th.num'));
  const th = table.querySelector('th.num');
  const column = [...th.parentElement.cells].indexOf(th);
  const click = () => {
    th.querySelector('button').click();
    return [...table.tBodies[0].rows].map((row) => Number(row.cells[column].dataset.value ?? row.cells[column].textContent));
  };
  return { down: click(), up: click() };
})()`;
