import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { readJsonFile } from '../base/files.js';
import type { Json } from '../base/job.js';
import { layerFromJson, toJson, type MoeReport } from './report.js';

/** What a finished folder says of its own making, if the very same job made it; undefined for any other folder or none. */
export async function finishedLayers(
  out: string,
  fingerprint: Readonly<Record<string, Json>>,
): Promise<Pick<MoeReport, 'layers' | 'exactness'> | undefined> {
  const provenance = (await readJsonFile(join(out, 'deepseek-convert.json'))) as
    { readonly recipe?: Record<string, Json>; readonly layers?: Json[]; readonly allExpertsOn?: Json } | undefined;
  if (provenance?.recipe === undefined) return undefined;
  // However it was called, the same fingerprint makes the same bytes.
  const { command: _, ...recipe } = provenance.recipe;
  const { command: __, ...wanted } = toJson(fingerprint) as Record<string, Json>;
  if (!isDeepStrictEqual(recipe, wanted)) return undefined;
  return {
    layers: (provenance.layers ?? []).map(layerFromJson),
    exactness: (provenance.allExpertsOn ?? undefined) as unknown as MoeReport['exactness'],
  };
}
