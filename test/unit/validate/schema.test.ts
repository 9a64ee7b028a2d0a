import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { z } from 'zod';
import { toJson } from '../../../src/validate/report/json.js';
import { reportVersion } from '../../../src/validate/report.js';
import { syntheticReport } from './synthetic.js';

type Schema = Record<string, unknown>;
const root = new URL('../../../', import.meta.url);
const name = `schemas/validate-report.v${reportVersion}.schema.json`;
const schema = JSON.parse(readFileSync(new URL(name, root), 'utf8')) as Schema;
const compile = (of: Schema) => z.fromJSONSchema(of);

/** The same schema, in which a field that it does not name is an error. */
function strict(of: unknown): unknown {
  if (Array.isArray(of)) return of.map(strict);
  if (typeof of !== 'object' || of === null) return of;
  const inner = Object.fromEntries(Object.entries(of).map(([key, value]) => [key, strict(value)]));
  return 'properties' in inner && inner.type === 'object' ? { ...inner, additionalProperties: false } : inner;
}

const reports = {
  dense: syntheticReport({ layers: 3, heads: 4 }),
  MoE: syntheticReport({ layers: 4, heads: 4, experts: 8, broken: 2 }),
};
const parsed = (report: (typeof reports)['dense']): Schema => JSON.parse(toJson(report)) as Schema;

describe(name, () => {
  it.each(Object.entries(reports))('holds for a %s report, and names every field of it', (_, report) => {
    const result = compile(strict(schema) as Schema).safeParse(parsed(report));
    expect(result.error?.issues ?? []).toEqual([]);
  });

  it.each([
    ['another version', { version: 2 }],
    ['no verdict', { passed: undefined }],
    ['a gate without status', { gates: [{ id: 'maxKl' }] }],
    ['text for a number', { logits: { ...reports.dense.logits, top1: '0.9' } }],
    ['an unknown profile', { profile: 'exakt' }],
  ])('refuses %s', (_, change) => {
    const report = JSON.parse(JSON.stringify({ ...parsed(reports.dense), ...change })) as Schema;
    expect(compile(schema).safeParse(report).success).toBe(false);
  });

  it('lets later minor versions add fields', () => {
    expect(compile(schema).safeParse({ ...parsed(reports.dense), later: 1 }).success).toBe(true);
  });

  it('goes out with the package', () => {
    const { files, exports } = JSON.parse(readFileSync(new URL('package.json', root), 'utf8')) as {
      files: string[];
      exports: Record<string, string>;
    };
    expect(files).toContain('schemas');
    expect(exports['./schemas/*']).toBe('./schemas/*');
  });
});
