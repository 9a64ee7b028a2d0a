#!/usr/bin/env node
import { existsSync } from 'node:fs';

const program = new URL('../dist/cli.js', import.meta.url);
if (existsSync(program)) {
  await import(program.href);
} else {
  console.error('error: deepseek-convert is not built here\n  Run: npm run build');
  process.exitCode = 4;
}
