import { ConvertError } from '../base/errors.js';
import type { Log } from '../base/log.js';
import type { Device } from './device.js';

/** What every long-running job gets. */
export interface JobEnv {
  readonly device: Device;
  readonly log: Log;
  /** Aborted on Ctrl-C or SIGTERM: finish the block, save, throw `interrupted`. */
  readonly signal: AbortSignal;
}

/** Call between blocks, when everything done so far is durable. */
export function stopIfAborted({ signal }: Pick<JobEnv, 'signal'>, resumeHint: string): void {
  if (signal.aborted)
    throw new ConvertError('interrupted', 'Interrupted; finished blocks are saved', { hint: resumeHint });
}
