import { execFileSync, spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, readdirSync, symlinkSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { root, shell, workFolder } from './support.js';

/** Commands of ```sh blocks; `npx deepseek-convert` is what `deepseek-convert` is here. */
function commandsOf(file: string): string[] {
  const text = readFileSync(join(root, file), 'utf8');
  const blocks = [...text.matchAll(/^```sh\n([^]*?)^```$/gm)].flatMap(([, block]) => block!.split('\n'));
  return blocks.filter((line) => line !== '' && !line.startsWith('#')).map((line) => line.replace(/^npx /, ''));
}

/** An empty place with what the commands name. */
function place(): string {
  const folder = workFolder();
  symlinkSync(join(root, 'fixtures'), join(folder, 'fixtures'));
  symlinkSync(join(root, 'README.md'), join(folder, 'README.md'));
  mkdirSync(join(folder, 'out'));
  mkdirSync(join(folder, 'build'));
  return folder;
}

/** The commands as they stand, on as little text as they accept: what a page leaves to the defaults, these decide. */
const env = {
  DEEPSEEK_CONVERT_SAMPLES: '8',
  DEEPSEEK_CONVERT_SEQ_LEN: '128',
  DEEPSEEK_CONVERT_ROUNDS: '1',
  DEEPSEEK_CONVERT_ROUTER_STEPS: '5',
  DEEPSEEK_CONVERT_GENERATIONS: '2',
  DEEPSEEK_CONVERT_NEW_TOKENS: '8',
  DEEPSEEK_CONVERT_VALIDATE_SAMPLES: '2',
  DEEPSEEK_CONVERT_MAX_TOKENS: '128',
  DEEPSEEK_CONVERT_DEVICE: 'cpu',
};

const pages = ['README.md', ...readdirSync(join(root, 'docs')).map((name) => `docs/${name}`)].filter((name) => name.endsWith('.md')); // prettier-ignore

describe.each(pages)('%s', (page) => {
  const folder = place();
  const commands = commandsOf(page).filter((line) => line.startsWith('deepseek-convert'));
  // In order: later commands read what earlier ones made.
  it.each(commands)(
    '%s',
    async (line) => {
      const { code, stderr } = await shell(line, { cwd: folder, env });
      // A gate may fail on these tiny models; that is an outcome, not an error.
      expect([0, line.includes(' validate ') ? 3 : 0], stderr).toContain(code);
    },
    240_000,
  );
  it('links to files that are there', () => {
    const links = [...readFileSync(join(root, page), 'utf8').matchAll(/\]\(([^)#]+)(?:#[^)]*)?\)/g)].map(
      ([, to]) => to!,
    );
    for (const to of links.filter((link) => !/^https?:/.test(link))) {
      expect(existsSync(join(root, dirname(page), to)), `${page} -> ${to}`).toBe(true);
    }
  });
});

describe('docs', () => {
  it('docs/cli.md and the manual page are what the option tables say (npm run docs)', () => {
    const check = () => execFileSync(process.execPath, [join(root, 'scripts/make-docs.mjs'), '--check'], { encoding: 'utf8' }); // prettier-ignore
    expect(check()).toMatch(/cli\.md is current[^]*deepseek-convert\.1 is current/);
  });
  it('every command has examples', () => {
    const sections = readFileSync(join(root, 'docs/cli.md'), 'utf8').split(/^## /m).slice(1, -2);
    expect(sections.length).toBeGreaterThan(12);
    for (const section of sections) expect(section).toMatch(/```sh\n# .+\ndeepseek-convert /);
  });
  it('the manual page is one', () => {
    const page = join(root, 'man/deepseek-convert.1');
    const { man } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { man: string[] };
    expect(man).toEqual(['man/deepseek-convert.1']);
    const made = spawnSync('groff', ['-man', '-ww', '-z', page], { encoding: 'utf8' });
    if (made.error) return console.log('note: groff is not installed: the manual page was only compared');
    expect([made.status, made.stderr]).toEqual([0, '']);
  });
  it('other commands of the README are scripts of the package', () => {
    const scripts = (JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { scripts: object }).scripts;
    const others = commandsOf('README.md').filter((line) => !line.startsWith('deepseek-convert'));
    for (const line of others) {
      for (const part of line.split(' && ')) {
        const name = /^npm (?:run )?(\S+)$/.exec(part)?.[1];
        expect(name === 'ci' || (name !== undefined && name in scripts), part).toBe(true);
      }
    }
  });
});
