import { spawnSync } from 'node:child_process';
import { describe, expect, it } from 'vitest';
import { cli, shell } from './support.js';

describe('completion', () => {
  /** What bash offers for the words of a line, the last of which is being typed. */
  async function offered(...words: string[]): Promise<string[]> {
    const { stdout, stderr, code } = await shell(
      `eval "$(deepseek-convert completion bash)"
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
