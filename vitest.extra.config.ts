import { defineConfig } from 'vitest/config';

/** Tests that need time or programs of others: `npm run test:cluster`, `npm run test:prometheus`, `npm run test:soak`. */
export default defineConfig({
  test: {
    include: ['test/cluster/**/*.test.ts', 'test/prometheus/**/*.test.ts', 'test/soak/**/*.test.ts'],
    testTimeout: 600_000,
    hookTimeout: 300_000,
    pool: 'forks',
    maxWorkers: 1,
  },
});
