import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { readTensors } from './files.js';
import { cli, fixture, root, v1, workFolder } from './support.js';

const folder = workFolder();
const at = (name: string): string => join(folder, name);
const sources = { dense: v1, moe: fixture('moe-6m') };
const models = ['dense', 'moe'] as const;
const blocks = ['q8_0', 'q6_k', 'q4_k', 'q4_0'];
/** SHA-256 of the files that fixtures/check_outputs.py found equal to their sources. */
const expected = JSON.parse(readFileSync(fixture('outputs.json'), 'utf8')) as Record<string, string>;
const python = join(root, '.venv/bin/python');

async function convert(input: string, out: string, ...flags: string[]): Promise<void> {
  const { code, stderr } = await cli(['convert', input, '-o', at(out), ...flags]);
  expect(stderr).not.toContain('rror');
  expect(code).toBe(0);
}

beforeAll(async () => {
  for (const model of models) {
    await convert(sources[model], `${model}-folder`);
    await convert(at(`${model}-folder`), `${model}.bin`);
    await convert(at(`${model}.bin`), `${model}.gguf`);
    await convert(at(`${model}.gguf`), `${model}-back`);
  }
  await convert(sources.moe, 'moe-shards', '--shard-size', '3MB');
  for (const type of blocks) await convert(sources.dense, `dense-${type}.gguf`, '--dtype', type);
});

describe('safetensors -> torch -> GGUF -> safetensors', () => {
  it.each(models)('%s-6m comes back with every bit, its config and its tokenizer', (model) => {
    const [before, after] = ['folder', 'back'].map((name) => readTensors(at(`${model}-${name}/model.safetensors`)));
    expect([...after!.keys()]).toEqual([...before!.keys()]);
    for (const [name, { dtype, shape, data }] of before!) {
      const same = after!.get(name)!;
      expect([name, same.dtype, same.shape]).toEqual([name, dtype, shape]);
      expect(Buffer.compare(same.data, data), name).toBe(0);
    }
    const json = (name: string): unknown => JSON.parse(readFileSync(at(name), 'utf8'));
    expect(json(`${model}-back/config.json`)).toEqual(json(`${model}-folder/config.json`));
    expect(json(`${model}-back/tokenizer.json`)).toEqual(json(`${model}-folder/tokenizer.json`));
  });

  it('every file is the one that Python found equal to its source', () => {
    const digest = (name: string): string => createHash('sha256').update(readFileSync(at(name))).digest('hex'); // prettier-ignore
    expect(Object.fromEntries(Object.keys(expected).map((name) => [name, digest(name)]))).toEqual(expected);
  });

  it('torch, safetensors and gguf-py read our files', (context) => {
    if (!existsSync(python)) {
      context.skip('no .venv with Python: the digests above stand for it');
      return;
    }
    const { status, stdout, stderr } = spawnSync(python, [fixture('check_outputs.py'), folder], { encoding: 'utf8' });
    expect(stderr.split('\n').filter((line) => /Error|assert/.test(line))).toEqual([]);
    expect(status).toBe(0);
    expect(JSON.parse(stdout)).toEqual(expected);
  });
});
