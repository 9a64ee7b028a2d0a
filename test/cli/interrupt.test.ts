import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { cli, json, shell, v1, workFolder, type Finished } from './support.js';

const folder = workFolder();
const args = ['quantize', v1, '--samples', '8', '--seq-len', '128', '--threads', '1', '--device', 'cpu'];

/** Runs the job and sends `signals`, the first when a block is done, the others when the program has answered. */
async function interrupted(out: string, signals: readonly NodeJS.Signals[], ...more: string[]): Promise<Finished> {
  return cli([...args, '-o', out, ...more], {
    started: (child) => {
      const left = [...signals];
      let seen = '';
      child.stderr!.on('data', (text: string) => {
        seen += text;
        const due = left.length === signals.length ? /quantize 1\/4/ : /SIG(INT|TERM): stopping/;
        if (left.length > 0 && due.test(seen)) child.kill(left.shift());
      });
    },
  });
}

const weights = (out: string): Buffer => readFileSync(join(out, 'model.safetensors'));

describe('a job that is interrupted', () => {
  it('by Ctrl-C or a kill says how to go on, keeps no output, and ends with the same bytes', async () => {
    const reference = join(folder, 'whole');
    expect((await cli([...args, '-o', reference])).code).toBe(0);
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGKILL'] as const) {
      const out = join(folder, signal);
      const first = await interrupted(out, [signal]);
      expect(existsSync(out)).toBe(false);
      expect(existsSync(`${out}.part`)).toBe(true);
      if (signal === 'SIGKILL') {
        expect(first.signal).toBe('SIGKILL');
      } else {
        expect(first.code).toBe(75);
        expect(first.stderr).toContain(`deepseek-convert ${[...args, '-o', out].join(' ')}`);
      }
      const second = await cli([...args, '-o', out, '--json']);
      expect(second.code).toBe(0);
      expect(json(second).resumed).toBe(true);
      expect(weights(out).equals(weights(reference))).toBe(true);
      expect(existsSync(`${out}.part`)).toBe(false);
    }
  }, 240_000);

  it('a second Ctrl-C stops at once', async () => {
    const out = join(folder, 'twice');
    const { code, stderr } = await interrupted(out, ['SIGINT', 'SIGINT']);
    expect(code).toBe(75);
    expect(stderr).toContain('Ctrl-C again stops at once');
    expect(stderr).toMatch(/Stopped at once|Interrupted/);
    expect(existsSync(out)).toBe(false);
  }, 120_000);

  it('is an error object under --json', async () => {
    const finished = await interrupted(join(folder, 'json'), ['SIGINT'], '--json');
    expect(finished.code).toBe(75);
    expect(json(finished)).toMatchObject({ ok: false, error: { kind: 'interrupted', exitCode: 75 } });
  }, 120_000);

  it('refuses to go on with other options, and begins anew with --restart', async () => {
    const out = join(folder, 'other');
    await interrupted(out, ['SIGINT']);
    const other = [...args, '-o', out, '--group-size', '64'];
    const { code, stderr } = await cli(other);
    expect(code).toBe(1);
    expect(stderr).toMatch(/different job[^]*128 -> 64[^]*--restart/);
    const anew = await cli([...other, '--restart', '--json']);
    expect(json(anew)).toMatchObject({ ok: true, resumed: false });
  }, 120_000);

  it('is not begun twice at the same time', async () => {
    const out = join(folder, 'both');
    const line = `deepseek-convert ${[...args, '-o', out].join(' ')}`;
    const { stderr, stdout } = await shell(
      `${line} & first=$!; until [ -e ${out}.part/lock ]; do sleep 0.05; done; ${line}; echo second $?; wait $first; echo first $?`,
    );
    expect(stdout.match(/^(first|second) 0$/gm)).toHaveLength(1);
    expect(stdout.match(/^(first|second) 1$/gm)).toHaveLength(1);
    expect(stderr).toContain('in use');
  }, 120_000);
});
