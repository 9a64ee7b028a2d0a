import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { readJsonFile } from '../base/files.js';
import type { Json } from '../base/job.js';
import type { SharedSearch } from './search-shared.js';
import { layerFromJson, toJson, type MoeReport } from './report.js';

type Provenance = Readonly<Record<string, Json>>;

/** The provenance of a finished output, if a job with this very fingerprint made it; undefined for any other, or none. */
export async function finishedBy(out: string, fingerprint: Provenance): Promise<Provenance | undefined> {
  const provenance = (await readJsonFile(join(out, 'deepseek-convert.json'))) as Provenance | undefined;
  if (provenance?.recipe === undefined) return undefined;
  // However it was called, the same fingerprint makes the same bytes.
  const { command: _, ...recipe } = provenance.recipe as Provenance;
  const { command: __, ...wanted } = toJson(fingerprint) as Provenance;
  return isDeepStrictEqual(recipe, wanted) ? provenance : undefined;
}

/** What a finished mixture says of its own making. */
export async function finishedLayers(
  out: string,
  fingerprint: Provenance,
): Promise<Pick<MoeReport, 'layers' | 'exactness' | 'sharedSearch'> | undefined> {
  const provenance = await finishedBy(out, fingerprint);
  return (
    provenance && {
      layers: ((provenance.layers ?? []) as readonly Json[]).map(layerFromJson),
      exactness: (provenance.allExpertsOn ?? undefined) as unknown as MoeReport['exactness'],
      ...(provenance.sharedSearch !== undefined && {
        sharedSearch: provenance.sharedSearch as unknown as SharedSearch,
      }),
    }
  );
}
