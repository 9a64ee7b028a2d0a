import { ConvertError } from '../base/errors.js';
import type { Log } from '../base/log.js';
import type { Device } from './device.js';
import type { Group } from './group.js';

/** What every long-running job gets. */
export interface JobEnv {
  readonly device: Device;
  /** Devices that train side by side, `device` the first of them; absent: one does all. */
  readonly group?: Group;
  readonly log: Log;
  /** Aborted on Ctrl-C or SIGTERM: finish the block, save, throw `interrupted`. */
  readonly signal: AbortSignal;
}

/** Call between blocks, when everything done so far is durable. `kept`: what the user still has. */
export function stopIfAborted(
  { signal }: Pick<JobEnv, 'signal'>,
  resumeHint: string,
  kept = 'finished blocks are saved',
): void {
  if (signal.aborted) throw new ConvertError('interrupted', `Interrupted; ${kept}`, { hint: resumeHint });
}

/** The same for work that only reads. */
export const stopReading = (env: Pick<JobEnv, 'signal'>): void =>
  stopIfAborted(env, 'The same command begins anew.', 'nothing was written');
