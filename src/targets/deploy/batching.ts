/** What the deployment files ask of every engine: these are the values of the design's serving section. */
export const batching = { maxBatchSize: 32, maxWaitMs: 50, order: 'longest_first' } as const;

/** A model as its deployment files need to know it. */
export interface Deployed {
  /** The name that clients ask for. */
  readonly name: string;
  readonly context: number;
  /** The largest of --tp, else 1. */
  readonly tensorParallel: number;
}

/** What an engine cannot be told, as comments of a shell script. */
export const warnings = (lines: readonly string[]): string[] => lines.map((line) => `# warning: ${line}`);

export const script = (lines: readonly string[]): string =>
  ['#!/bin/sh', '# Run it in any folder; more flags of the engine can follow.', 'set -eu', ...lines, ''].join('\n');

/** The folder in which a script lies. */
export const here = 'here=$(cd "$(dirname "$0")" && pwd)';

/** A name that a shell takes as one word. */
export const quoted = (text: string): string => `'${text.replaceAll("'", "'\\''")}'`;
