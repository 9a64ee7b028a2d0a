import { describe, expect, it } from 'vitest';
import { diffWords } from '../../../src/validate/report/diff.js';
import { toHtml } from '../../../src/validate/report/html.js';
import { toJson } from '../../../src/validate/report/json.js';
import { toMarkdown } from '../../../src/validate/report/markdown.js';
import { escapeHtml, show } from '../../../src/base/html/markup.js';
import { heatMap, linearScale, logScale } from '../../../src/validate/report/plots.js';
import { syntheticReport } from './synthetic.js';

const small = syntheticReport({ layers: 4, heads: 4, experts: 8 });

describe('HTML report', () => {
  const page = toHtml(small);

  it('asks for nothing from anywhere, and forbids it', () => {
    expect(page).toContain("default-src 'none'");
    expect(page).not.toMatch(/(src|href)="?(https?:)?\/\//);
    expect(page).not.toMatch(/url\(|@import|<link(?! rel="icon" href="data:,")/);
    expect([...page.matchAll(/<(?:script|style|link|img|iframe|object)\b[^>]*/g)].map(([tag]) => tag)).toEqual([
      '<link rel="icon" href="data:," /',
      '<style',
      '<script type="application/json" id="data"',
      '<script',
    ]);
  });

  it('closes every element that it opens', () => {
    const open: string[] = [];
    const body = page.replace(/<(script|style)\b[^>]*>[\s\S]*?<\/\1>/g, '').replace(/<!doctype html>/i, '');
    for (const [, close, name, self] of body.matchAll(/<(\/?)([a-z][a-z0-9]*)\b[^>]*?(\/?)>/gi)) {
      if (self || ['meta', 'link', 'br', 'input'].includes(name!)) continue;
      if (!close) open.push(name!);
      else expect(open.pop()).toBe(name);
    }
    expect(open).toEqual([]);
  });

  it('escapes what comes from models and paths', () => {
    expect(page).toContain('Prompt 1: the &lt;first&gt; &amp; &quot;last&quot; words of');
    expect(page).not.toContain('<first>');
    expect(page).not.toContain('<see>');
    const hostile = {
      ...small,
      notes: ['</script><script>alert(1)</script>'],
      reference: { ...small.reference, path: '/a/<img src=x>' },
    };
    const evil = toHtml(hostile);
    expect(evil).not.toContain('<script>alert');
    expect(evil).not.toContain('<img');
  });

  it('has a map for each mode and measure, bars for each MoE layer, marks in the generations', () => {
    for (const mode of ['teacherForced', 'freeRunning']) {
      for (const what of ['divergence', 'cosine', 'overlap']) expect(page).toContain(`id="map-${mode}-${what}"`);
    }
    expect(page.match(/Load of the experts of layer/g)).toHaveLength(3);
    expect(page).toContain('<mark>');
    expect(page).toContain('both, word for word');
  });

  it('stays below 2 MB at 60 layers of 64 heads and 256 experts', () => {
    const big = toHtml(syntheticReport({ layers: 60, heads: 64, experts: 256, broken: 23 }));
    expect(Buffer.byteLength(big)).toBeLessThan(2_000_000);
    expect(big).toContain('Layer 23 (model.layers.23) stands out');
  });

  it('is the same for the same report', () => {
    expect(toHtml(syntheticReport({ layers: 4, heads: 4, experts: 8 }))).toBe(page);
  });
});

describe('plots', () => {
  const paths = (svg: string) =>
    Object.fromEntries(
      [...svg.matchAll(/<path class="(h\w)" d="([^"]*)"/g)].map(([, level, d]) => [level!, d!] as const),
    );

  it('draws each cell once, at its place, by level', () => {
    const values = [[0, 1], [100, 100], null]; // prettier-ignore
    const svg = heatMap({ values, columns: 2, scale: linearScale(0, 100), xTitle: 'x', yTitle: 'y', label: 'l' }).text;
    expect(paths(svg)).toEqual({ h0: 'M0 0h2v1h-2z', h9: 'M0 1h2v1h-2z', hx: 'M0 2h2v1h-2z' });
  });

  it('spreads levels by logarithm and keeps zero apart', () => {
    const scale = logScale([0, 1e-3, 1e-1, null]);
    expect([0, 1e-3, 1e-2, 1e-1].map((v) => scale.level(v))).toEqual([0, 1, 5, 9]);
    expect(scale.level(null)).toBe(-1);
    expect(scale.level(NaN)).toBe(9);
    expect(logScale([0, 0]).level(0)).toBe(0);
  });
});

describe('differing spans', () => {
  const text = (spans: readonly { text: string }[]): string => spans.map((s) => s.text).join('');
  const marked = (spans: readonly { text: string; same: boolean }[]): string[] =>
    spans.flatMap((s) => (s.same ? [] : [s.text.trim()]));

  it('keep the texts whole and mark what differs', () => {
    const [a, b] = ['The old mill, by the river. 时间很慢', 'The new mill by the river. 时间不慢'];
    const { a: left, b: right } = diffWords(a, b);
    expect([text(left), text(right)]).toEqual([a, b]);
    expect(marked(left)).toEqual(['old', ',', '很']);
    expect(marked(right)).toEqual(['new', '不']);
  });
  it('marks nothing in equal texts and all of unlike ones', () => {
    expect(marked(diffWords('a b c', 'a b c').a)).toEqual([]);
    expect(marked(diffWords('a b', 'x y z').b)).toEqual(['x y z']);
    expect(diffWords('', 'x').a).toEqual([]);
  });
});

describe('numbers and text', () => {
  it('shows numbers for people', () => {
    const shown = [0, 0.0123456, 12.3456, 123456, 1.5e-7, -0.25, null, NaN].map((v) => show(v));
    expect(shown).toEqual(['0', '0.0123', '12.35', '1.23e5', '1.50e-7', '-0.25', 'n/a', 'not finite']);
  });
  it('replaces what would break the page', () => {
    expect(escapeHtml('a\u0000<b>\ud800&\n')).toBe('a\ufffd&lt;b&gt;\ufffd&amp;\n');
  });
});

describe('JSON and Markdown', () => {
  it('JSON is the report itself', () => {
    expect(JSON.parse(toJson(small))).toEqual(JSON.parse(JSON.stringify(small)));
    expect(small).toMatchObject({ schema: 'deepseek-convert/validate-report', version: 1 });
  });
  it('Markdown names verdict, gates and remedies; cells cannot break the table', () => {
    const report = syntheticReport({ layers: 6, heads: 8, broken: 2 });
    const text = toMarkdown({ ...report, gates: report.gates.map((g) => ({ ...g, where: 'a | b\nc' })) });
    expect(text).toContain('**FAILED**');
    expect(text).toContain('--max-layer-error: Convert this layer');
    const rows = text.split('\n').filter((line) => line.startsWith('|'));
    expect(rows.filter((line) => line.includes('a \\| b c')).length).toBeGreaterThan(5);
  });
});
