import type { Json } from '../base/job.js';
import { commonOptions } from './shared.js';
import type { Settings } from './types.js';

/** What a command was asked for, without what only decides how it talks: for provenance. */
export function settingsOf(
  command: string,
  values: Readonly<Record<string, unknown>>,
  from: Readonly<Record<string, string>>,
): Settings {
  const own = ([key]: [string, unknown]) => !(key in commonOptions);
  const options = Object.entries(values).filter(own).map(([key, value]) => [key, value ?? null] as [string, Json]); // prettier-ignore
  return Object.freeze({
    command,
    options: Object.freeze(Object.fromEntries(options)),
    from: Object.freeze(Object.fromEntries(Object.entries(from).filter(own))),
  });
}
