import { ConvertError } from '../base/errors.js';
import { runTask } from './slurm-task.js';

// What the scripts of the Slurm executor start on a node: `node slurm-main.js <spec.json>`.
const [gone, timeUp] = [new AbortController(), new AbortController()];
for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP'] as const) process.on(signal, () => gone.abort());
process.on('SIGUSR2', () => timeUp.abort());
try {
  process.exitCode = await runTask(process.argv[2] ?? '', process.env, { gone: gone.signal, timeUp: timeUp.signal });
} catch (error) {
  process.stderr.write(`error: ${error instanceof ConvertError ? error.message : (error as Error).stack}\n`);
  process.exitCode = error instanceof ConvertError ? error.exitCode : 70;
}
