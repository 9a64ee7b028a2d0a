// Stands in for the package `vitest` on GPU machines without a network: the same describe/it/hooks, the same `expect`
// (from @vitest/expect), one table at the end. Only what test/ops uses.
import { JestAsymmetricMatchers, JestChaiExpect, JestExtend, GLOBAL_EXPECT } from '@vitest/expect';
import * as chai from 'chai';

chai.use(JestExtend);
chai.use(JestChaiExpect);
chai.use(JestAsymmetricMatchers);
export const expect = (value, message) => chai.expect(value, message);
for (const name of ['fail', 'extend']) expect[name] = chai.expect[name];
Object.assign(expect, Object.fromEntries(['any', 'anything', 'objectContaining', 'arrayContaining', 'stringContaining', 'stringMatching', 'closeTo'].map((name) => [name, chai.expect[name]]))); // prettier-ignore
globalThis[GLOBAL_EXPECT] = expect;

const root = { name: '', suites: [], tests: [], before: [], after: [], beforeEach: [], afterEach: [] };
let current = root;
const suite = (name, options, body = options) => {
  const inner = { name, suites: [], tests: [], before: [], after: [], beforeEach: [], afterEach: [] };
  current.suites.push(inner);
  const outer = current;
  current = inner;
  body();
  current = outer;
};
const test = (name, options, body) =>
  current.tests.push({ name, body: typeof options === 'function' ? options : body });
const each = (add) => (rows) => (name, body) =>
  rows.forEach((row) => {
    const values = Array.isArray(row) ? row : [row];
    let k = 0;
    add(
      name.replace(/%[sdifoj]/g, () => String(values[k++])).replace(/\$(\w+)/g, (_, key) => String(row[key])),
      () => body(...values),
    );
  });
for (const f of [suite, test]) {
  f.each = each(f);
  f.skipIf = (skip) => (skip ? () => undefined : f);
  f.runIf = (run) => (run ? f : () => undefined);
  f.skip = () => undefined;
}
export { suite as describe, test as it, test };
export const beforeAll = (f) => current.before.push(f);
export const afterAll = (f) => current.after.push(f);
export const beforeEach = (f) => current.beforeEach.push(f);
export const afterEach = (f) => current.afterEach.push(f);

/** Runs what was registered; `select` decides by the full name. Resolves to { passed, failed, rows }. */
export async function runAll(select = () => true) {
  const result = { passed: 0, failed: 0, rows: [], failures: [] };
  const run = async (s, path, hooks) => {
    const full = [...path, s.name].filter(Boolean);
    const each = { before: [...hooks.before, ...s.beforeEach], after: [...s.afterEach, ...hooks.after] };
    const tests = s.tests.filter((t) => select([...full, t.name].join(' > ')));
    const wanted = tests.length > 0 || s.suites.length > 0;
    const row = { name: full.join(' > '), passed: 0, failed: 0, ms: 0 };
    const attempt = async (name, body) => {
      const start = performance.now();
      try {
        await body();
        row.passed++;
      } catch (error) {
        row.failed++;
        result.failures.push(`${[...full, name].join(' > ')}\n    ${String(error?.message ?? error).slice(0, 600).replaceAll('\n', '\n    ')}`); // prettier-ignore
      }
      row.ms += performance.now() - start;
    };
    const quiet = s.tests.length > 0 && tests.length === 0 && s.suites.length === 0;
    try {
      if (wanted && !quiet) for (const f of s.before) await f();
    } catch (error) {
      for (const t of tests) await attempt(t.name, () => Promise.reject(error));
      return;
    }
    for (const t of tests) {
      await attempt(t.name, async () => {
        for (const f of each.before) await f();
        try {
          await t.body();
        } finally {
          for (const f of each.after) await f();
        }
      });
    }
    for (const inner of s.suites) await run(inner, full, each);
    if (wanted && !quiet) {
      for (const f of s.after) {
        await Promise.resolve()
          .then(f)
          .catch((error) => attempt('afterAll', () => Promise.reject(error)));
      }
    }
    if (tests.length > 0) result.rows.push(row);
    result.passed += row.passed;
    result.failed += row.failed;
  };
  await run(root, [], { before: [], after: [] });
  return result;
}
