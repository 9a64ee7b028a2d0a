import { readFileSync } from 'node:fs';

const facts = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
  name: string;
  version: string;
};

/** This tool, for provenance and fingerprints. */
export const tool: { readonly name: string; readonly version: string } = Object.freeze({
  name: facts.name,
  version: facts.version,
});
