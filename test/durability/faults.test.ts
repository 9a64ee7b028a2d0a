import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { copyFileSync, existsSync, readFileSync, statSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { cli, fixture, listing, v1, workFolder, type Finished } from '../cli/support.js';

const folder = workFolder();
const model = join(folder, 'model.bin');
const config = join(folder, 'model.config.json');
// Shards of a tensor each, smaller than the states between blocks: a limit on file sizes hits the states.
const args = (name: string, input = model): string[] => [
  'quantize', input, '-o', join(folder, name), '--calibration', fixture('samples.jsonl'),
  '--samples', '20', '--seq-len', '512', '--states', 'f32', '--shard-size', '1MB', '--no-validate', '--progress', 'plain',
]; // prettier-ignore

/** Runs, and once the first block is done does `then` to the process. */
async function afterFirstBlock(name: string, then: (pid: number) => void, input = model): Promise<Finished> {
  let done = false;
  return await cli(args(name, input), {
    started: (child) => {
      child.stderr?.on('data', (text: Buffer | string) => {
        if (done || !/quantize 1\/4/.test(String(text))) return;
        done = true;
        then(child.pid!);
      });
    },
  });
}

const hashes = (name: string): Record<string, string> =>
  Object.fromEntries(
    listing(join(folder, name))
      .filter((file) => file !== 'deepseek-convert.json')
      .map((file) => [
        file,
        createHash('sha256')
          .update(readFileSync(join(folder, name, file)))
          .digest('hex'),
      ]),
  );

let whole: Record<string, string> = {};
beforeAll(async () => {
  copyFileSync(v1, model);
  copyFileSync(v1.replace('.bin', '.config.json'), config);
  for (const file of ['tokenizer.json', 'tokenizer_config.json'])
    if (existsSync(join(v1, '..', file))) copyFileSync(join(v1, '..', file), join(folder, file));
  const run = await cli(args('whole'));
  expect(run.code, run.stderr).toBe(0);
  whole = hashes('whole');
}, 300_000);

async function goesOn(name: string): Promise<void> {
  expect(existsSync(join(folder, name))).toBe(false);
  expect(existsSync(join(folder, `${name}.part`))).toBe(true);
  const again = await cli(args(name));
  expect(again.code, again.stderr).toBe(0);
  expect(again.stderr).toMatch(/Going on after block [1-3] of 4/);
  expect(hashes(name)).toEqual(whole);
}

describe('quantize, when something fails half way', () => {
  it('keeps what is done when a file cannot grow any more, and goes on once it can', async () => {
    if (spawnSync('prlimit', ['--version']).status !== 0) return console.log('skipped: no prlimit here');
    let limited = 1;
    const run = await afterFirstBlock('full', (pid) => {
      process.kill(pid, 'SIGSTOP'); // it waits until the limit stands
      limited = spawnSync('prlimit', ['--pid', String(pid), '--fsize=6000000']).status ?? 1;
      process.kill(pid, 'SIGCONT');
    });
    expect(limited).toBe(0);
    expect(run.code, run.stderr).toBe(4);
    expect(run.stderr).toMatch(/hidden-next-\d+-\d\.bin/);
    await goesOn('full');
  }, 300_000);

  it('keeps what is done when the input cannot be read any more, says where, and goes on once it can', async () => {
    const bytes = readFileSync(model);
    const run = await afterFirstBlock('cut', () => truncateSync(model, Math.floor(statSync(model).size / 2)));
    writeFileSync(model, bytes);
    expect(run.code, run.stderr).not.toBe(0);
    expect(run.code).not.toBe(70);
    expect(run.stderr).toContain(model);
    await goesOn('cut');
  }, 300_000);

  it('refuses to go on with another model of the same shapes', async () => {
    const run = await afterFirstBlock('other', (pid) => void process.kill(pid, 'SIGKILL'));
    expect(run.signal).toBe('SIGKILL');
    const bytes = Buffer.from(readFileSync(model));
    // Other mantissa bits in the embedding; every header and length as before.
    for (let at = 1_000_000; at < 3_000_000; at += 2) bytes[at] = bytes[at]! ^ 1;
    const before = readFileSync(model);
    writeFileSync(model, bytes);
    const other = await cli(args('other'));
    writeFileSync(model, before);
    expect(other.code, other.stderr).toBe(1);
    expect(other.stderr).toMatch(/weights: "[0-9a-f]+" -> "[0-9a-f]+"/);
    await goesOn('other');
  }, 300_000);
});
