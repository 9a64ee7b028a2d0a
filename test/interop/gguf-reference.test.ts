import { cpSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { expect, test } from 'vitest';
import { testEnv, trainedModel } from '../arch/support.js';
import { convert, python, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();

interface Compared {
  readonly problems: readonly string[];
  readonly tensors: number;
  /** Keys that gguf-py does not know, and those that it knows but a converter leaves to their defaults. */
  readonly unknown_keys: readonly string[];
  readonly more_keys: readonly string[];
}

/** A copy with a chat template, which the small models lack. */
function withTemplate(path: string): string {
  const folder = join(work, 'chat');
  cpSync(path, folder, { recursive: true });
  writeFileSync(join(folder, 'chat_template.jinja'), "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"); // prettier-ignore
  return folder;
}

const model = trainedModel('dense-6m');

test.skipIf(!model).each([
  ['dense-6m', (path: string) => path],
  ['dense-6m with a chat template', withTemplate],
])('%s as bf16 GGUF has what llama.cpp’s converter writes', async (name, prepare) => {
  const [path, out] = [prepare(model!), join(work, `${name}.gguf`)];
  await convert({ input: path, format: 'gguf', dtype: 'bf16' }, out, env);
  const found = await python<Compared>('gguf_reference.py', path, out);
  expect(found.problems).toEqual([]);
  expect(found.unknown_keys).toEqual([]);
  // The converter takes `pre` from a table of hashes of known tokenizers.
  const own = ['add_eos_token', 'pre'].map((key) => `tokenizer.ggml.${key}`);
  expect(found.more_keys).toEqual([...own, 'tokenizer.huggingface.json']);
  expect(found.tensors).toBe(38);
  // The comparison sees what is wrong: the same file against another config.
  const other = await python<Compared>('gguf_reference.py', trainedModel('dense-32m') ?? path, out);
  if (trainedModel('dense-32m')) expect(other.problems.length).toBeGreaterThan(10);
});
