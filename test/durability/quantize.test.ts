import { createHash } from 'node:crypto';
import { existsSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { cli, fixture, listing, v1, workFolder, type Finished } from '../cli/support.js';

// npm run test:durability kills 50 times; the ordinary suite a few.
const kills = Number(process.env.DURABILITY_KILLS ?? 3);
const seed = Number(process.env.DEEPSEEK_CONVERT_TEST_SEED ?? Date.now() % 1_000_000);
const folder = workFolder();
const args = (name: string, ...more: string[]): string[] => [
  'quantize', v1, '-o', join(folder, name),
  '--calibration', fixture('samples.jsonl'), '--samples', '8', '--seq-len', '64', '--validate-samples', '2', '--progress', 'plain', ...more,
]; // prettier-ignore

let state = seed;
const draw = (): number => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32;
};

/** Runs and sends `signal` after `ms`. */
async function stopped(name: string, ms: number, signal: NodeJS.Signals): Promise<Finished> {
  let timer: NodeJS.Timeout | undefined;
  const run = await cli(args(name), {
    started: (child) => (timer = setTimeout(() => child.kill(signal), ms)),
  });
  clearTimeout(timer);
  return run;
}

/** Runs and sends `signal` when the first block is done. */
const stoppedAfterBlock = (name: string, signal: NodeJS.Signals): Promise<Finished> =>
  cli(args(name), {
    started: (child) => {
      let [seen, sent] = ['', false];
      child.stderr!.on('data', (text: string) => {
        seen += text;
        if (!sent && /quantize 1\/4/.test(seen)) sent = child.kill(signal);
      });
    },
  });

/** Every file of an output by its bytes. */
function hashes(name: string): Record<string, string> {
  const hash = (file: string) => createHash('sha256').update(readFileSync(join(folder, name, file))).digest('hex'); // prettier-ignore
  return Object.fromEntries(listing(join(folder, name)).map((file) => [file, hash(file)]));
}

/** Only the file that quotes the command line differs between two output names. */
const comparable = ({ 'deepseek-convert.json': _, ...files }: Record<string, string>): Record<string, string> => files;

describe(`quantize, killed ${kills} times, seed ${seed}`, () => {
  let whole: Record<string, string> = {};
  let duration = 0;

  it('runs through once', async () => {
    const started = performance.now();
    const run = await cli(args('whole'));
    duration = performance.now() - started;
    expect(run.code).toBe(0);
    whole = comparable(hashes('whole'));
    expect(Object.keys(whole)).toContain('model.safetensors');
  });

  it('ends with the same bytes however often it is killed', async () => {
    let left = kills;
    let finished = 0;
    let resumed = 0;
    while (left > 0) {
      const run = await stopped('killed', 150 + draw() * duration, 'SIGKILL');
      if (run.signal === 'SIGKILL') {
        left--;
        // Nothing has its name before it is complete.
        if (existsSync(join(folder, 'killed'))) expect(comparable(hashes('killed'))).toEqual(whole);
        if (left > 0) continue;
      } else expect(run.code, run.stderr).toBe(0);
      const last = run.code === 0 ? run : await cli(args('killed'));
      expect(last.code, last.stderr).toBe(0);
      if (/Going on after block/.test(last.stderr)) resumed++;
      expect(comparable(hashes('killed'))).toEqual(whole);
      expect(existsSync(join(folder, 'killed.part'))).toBe(false);
      finished++;
      rmSync(join(folder, 'killed'), { recursive: true });
    }
    expect(finished).toBeGreaterThan(0);
    console.log(`${finished} outputs from ${kills} kills, ${resumed} of them resumed in the last run`);
  }, 1_800_000);

  it('saves its blocks on Ctrl-C, says how to go on, and goes on', async () => {
    const run = await stoppedAfterBlock('interrupted', 'SIGINT');
    expect(run.code, run.stderr).toBe(75);
    // On a busy machine the signal may come as late as the validation of the output.
    expect(run.stderr).toMatch(/Interrupted; (finished blocks are saved|the comparison is not kept)[\s\S]*[Gg]o on( with)?: deepseek-convert quantize/); // prettier-ignore
    expect(existsSync(join(folder, 'interrupted'))).toBe(false);
    const again = await cli(args('interrupted'));
    expect(again.code).toBe(0);
    expect(comparable(hashes('interrupted'))).toEqual(whole);
  });

  it('refuses to go on with another recipe or other text, and says what differs', async () => {
    expect((await stoppedAfterBlock('other', 'SIGKILL')).signal).toBe('SIGKILL');
    expect(existsSync(join(folder, 'other.part'))).toBe(true);
    const recipe = await cli(args('other', '--damp', '0.02'));
    expect(recipe.code).toBe(1);
    expect(recipe.stderr).toMatch(/recipe\.damp: 0\.01 -> 0\.02/);
    const text = await cli(args('other', '--seed', '3'));
    expect(text.code).toBe(1);
    expect(text.stderr).toMatch(/calibration\.text: "[0-9a-f]+" -> "[0-9a-f]+"/);
    const same = await cli(args('other'));
    expect(same.code).toBe(0);
    expect(comparable(hashes('other'))).toEqual(whole);
  });
});
