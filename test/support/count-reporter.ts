import { mkdirSync, writeFileSync } from 'node:fs';
import type { Reporter, TestModule } from 'vitest/node';

/** Writes `build/test-counts.json`, from which `.ci/run` prints its closing line. */
export default class CountReporter implements Reporter {
  onTestRunEnd(modules: readonly TestModule[]): void {
    const counts = { passed: 0, failed: 0, skipped: 0 };
    for (const module of modules) {
      let ran = 0;
      for (const test of module.children.allTests()) {
        ran++;
        const state = test.result().state;
        if (state === 'passed') counts.passed++;
        else if (state === 'skipped') counts.skipped++;
        else counts.failed++;
      }
      // A file that fails to load has no tests, and must count as a failure.
      if (module.errors().length > 0 || (ran === 0 && module.state() === 'failed')) counts.failed++;
    }
    mkdirSync('build', { recursive: true });
    writeFileSync('build/test-counts.json', JSON.stringify(counts));
  }
}
