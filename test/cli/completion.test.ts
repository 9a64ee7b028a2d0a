import { spawnSync } from 'node:child_process';
import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { cli, shell, workFolder } from './support.js';

describe('completion', () => {
  const script = join(workFolder(), 'completion.bash');
  beforeAll(async () => writeFileSync(script, (await cli(['completion', 'bash'])).stdout));
  /** What bash offers for the words of a line, the last of which is being typed. */
  async function offered(...words: string[]): Promise<string[]> {
    const { stdout, stderr, code } = await shell(
      `source ${script}
       COMP_WORDS=(deepseek-convert ${words.map((w) => `'${w}'`).join(' ')}); COMP_CWORD=${words.length}
       _deepseek_convert; printf '%s\\n' "\${COMPREPLY[@]}"`,
    );
    expect([stderr, code]).toEqual(['', 0]);
    return stdout.split('\n').filter(Boolean);
  }
  it('offers commands, flags and values in bash', async () => {
    expect(await offered('ins')).toEqual(['inspect']);
    expect(await offered('inspect', 'model', '--ten')).toEqual(['--tensors']);
    expect(await offered('doctor', '--progress', 'pl')).toEqual(['plain']);
    expect(await offered('inspect', 'fold')).toEqual([]); // files, by bash itself
    expect(await offered('inspect', '--config', '')).toEqual([]);
    expect(await offered('completion', '')).toEqual(['bash', 'zsh', 'fish']);
    expect(await offered('config', 's')).toEqual(['show']);
    expect(await offered('config', 'show', 'quan')).toEqual(['quantize']);
    expect(await offered('config', 'show', 'quantize', '--group')).toEqual(['--group-size']);
  });
  it('offers every command, and all its flags', async () => {
    const { stdout } = await cli(['--help']);
    const names = [...stdout.matchAll(/^ {2}([a-z]+) {2,}\S/gm)].map(([, name]) => name!);
    expect(names.length).toBeGreaterThan(12);
    expect(await offered('')).toEqual([...names, '--help', '--version']);
    const { stdout: help } = await cli(['demo', '--help']);
    const flags = [...help.matchAll(/^ {2}(?:-\w, )?(--[a-z-]+)/gm)].map(([, flag]) => flag!).filter((f) => f !== '--help'); // prettier-ignore
    expect((await offered('demo', '--')).sort()).toEqual(flags.sort());
  });
  it.each(['bash', 'zsh', 'fish'])('%s reads its script', async (name) => {
    const { code, stdout } = await cli(['completion', name]);
    expect(code).toBe(0);
    expect(stdout).toContain('--no-color'.slice(2));
    const program = spawnSync(name, ['-n', '-c', stdout], { encoding: 'utf8' });
    if (program.error) return console.log(`note: ${name} is not installed: its script was only printed`);
    expect([program.status, program.stderr]).toEqual([0, '']);
  });
  it('refuses other shells', async () => {
    const { code, stderr } = await cli(['completion', 'fihs']);
    expect(code).toBe(2);
    expect(stderr).toContain('Did you mean fish?');
  });
});
