import { execFileSync } from 'node:child_process';

/** What is measured: the commit here, or where there is no repository what DEEPSEEK_CONVERT_COMMIT says. */
export const commit = (() => {
  if (process.env.DEEPSEEK_CONVERT_COMMIT) return process.env.DEEPSEEK_CONVERT_COMMIT;
  try {
    const options = { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] };
    return execFileSync('git', ['rev-parse', '--short', 'HEAD'], options).trim();
  } catch {
    return 'unknown';
  }
})();
