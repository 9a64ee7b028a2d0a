import { lstatSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { tinyModel } from '../soak/model.js';
import { shell, workFolder } from './support.js';

const folder = workFolder();
const model = tinyModel(join(folder, 'model'));
/** Like the command that it stands in, each with what it writes. */
writeFileSync(
  join(folder, 'jobs.yaml'),
  `
defaults: { input: ${model}, out: '\${name}', device: cpu }
jobs:
  - { name: half, command: convert, dtype: f16 }
  - { name: file, command: convert, out: file.bin }
  - { name: int4, command: quantize, method: rtn, group-size: 32, validate: false, emit: vllm }
`,
);

describe.each(['027', '077'])('with umask %s', (umask) => {
  it('outputs, their folders, logs and metrics are as open as it allows', async () => {
    const root = `made-${umask}`;
    const { code, stderr } = await shell(
      `umask ${umask}; mkdir ${root}; cd ${root}; deepseek-convert batch ../jobs.yaml --metrics-file batch.prom`,
      { cwd: folder },
    );
    expect(code, stderr).toBe(0);
    const mask = Number.parseInt(umask, 8);
    const names = readdirSync(join(folder, root), { recursive: true, encoding: 'utf8' });
    for (const made of ['half/model.safetensors', 'half/config.json', 'file.bin', 'file.config.json', 'int4/deepseek-convert.json', 'int4/serve-vllm.sh', 'batch.prom', 'jobs.batch/state.json', 'jobs.batch/logs/int4.log', 'jobs.batch/events.ndjson', 'deepseek-convert-history.jsonl']) {
      expect(names).toContain(made);
    } // prettier-ignore
    const wrong = names.filter((name) => {
      const facts = lstatSync(join(folder, root, name));
      // Scripts may be executable.
      const open = facts.isDirectory() ? [0o777] : [0o666, 0o777];
      return !open.some((mode) => (facts.mode & 0o777) === (mode & ~mask));
    });
    expect(wrong).toEqual([]);
  }, 120_000);
});
