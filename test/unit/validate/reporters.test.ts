import { describe, expect, it } from 'vitest';
import { toGithub, toJunit } from '../../../src/validate/report/reporters.js';
import { syntheticReport } from './synthetic.js';

const good = syntheticReport({ layers: 4, heads: 4 });
const bad = syntheticReport({ layers: 4, heads: 4, broken: 2 });

describe('github', () => {
  it('one annotation for each failed gate, and one for the verdict', () => {
    const failed = bad.gates.filter(({ status }) => status === 'fail');
    expect(failed.length).toBeGreaterThan(0);
    const lines = toGithub(bad).split('\n');
    expect(lines).toHaveLength(failed.length + 1);
    expect(lines.every((line) => line.startsWith('::error title='))).toBe(true);
    expect(lines[0]).toContain('(--max-layer-error); layer 2 (model.layers.2)%0A');
    expect(toGithub(good)).toMatch(/^::notice title=Validation passed::dense-32m-int4 against dense-32m: KL [\d.]+/);
  });
  it('escapes what would end a command or a property', () => {
    const gates = bad.gates.map((gate) => ({ ...gate, name: 'a: b, c', where: '100%\n::warning::x' }));
    const text = toGithub({ ...bad, gates });
    expect(text).toContain('title=a%3A b%2C c::');
    expect(text).toContain('100%25%0A::warning::x');
    expect(text.split('\n').filter((line) => !line.startsWith('::error'))).toEqual([]);
  });
});

describe('junit', () => {
  it('one case for each gate, counted as the header says', () => {
    const xml = toJunit(bad);
    const count = (tag: string) => xml.match(new RegExp(`<${tag}[ >]`, 'g'))?.length ?? 0;
    const [, tests, failures, skipped] = /tests="(\d+)" failures="(\d+)" errors="0" skipped="(\d+)"/.exec(xml)!;
    expect(count('testcase')).toBe(Number(tests));
    expect(count('failure')).toBe(Number(failures));
    expect(count('skipped')).toBe(Number(skipped));
    expect(Number(failures)).toBe(bad.gates.filter(({ status }) => status === 'fail').length);
    expect(toJunit(good)).not.toContain('<failure');
  });
  it('is well-formed whatever names and places say', () => {
    const gates = bad.gates.map((gate) => ({ ...gate, name: `<&"'>`, where: ']]><b>\u0000' }));
    const xml = toJunit({ ...bad, gates });
    const open: string[] = [];
    for (const [, close, name, self] of xml.matchAll(/<(\/?)([a-z]+)[^<>]*?(\/?)>/g)) {
      if (self) continue;
      if (close) expect(open.pop()).toBe(name);
      else open.push(name!);
    }
    expect(open).toEqual([]);
    expect(xml.replace(/<[^<>]*>/g, '')).not.toMatch(/[<]|&(?!(amp|lt|gt|quot|apos);)/);
    expect(xml).not.toContain('\u0000');
  });
});
