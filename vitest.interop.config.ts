import { defineConfig } from 'vitest/config';

/** Engines that are not ours load our outputs: `npm run test:interop`. Installs what it needs, see test/interop/setup.ts. */
export default defineConfig({
  test: {
    include: ['test/interop/**/*.test.ts'],
    globalSetup: ['test/interop/setup.ts'],
    testTimeout: 300_000,
    hookTimeout: 300_000,
    pool: 'forks',
    maxWorkers: 2,
  },
});
