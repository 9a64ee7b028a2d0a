import { existsSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { makeFolder } from '../../../src/base/files.js';

const folder = mkdtempSync(join(tmpdir(), 'files-'));
afterAll(() => rmSync(folder, { recursive: true }));

test('folders are made with those above them, also where they are already, also twice at once', async () => {
  await Promise.all([makeFolder(join(folder, 'a/b/c')), makeFolder(join(folder, 'a/b/d'))]);
  await makeFolder(join(folder, 'a/b/c'));
  expect(['c', 'd'].every((name) => existsSync(join(folder, 'a/b', name)))).toBe(true);
});

test('a file or a link to nowhere in the way is an error', async () => {
  writeFileSync(join(folder, 'file'), '');
  symlinkSync(join(folder, 'nowhere'), join(folder, 'link'));
  await expect(makeFolder(join(folder, 'file'))).rejects.toMatchObject({ code: 'EEXIST' });
  await expect(makeFolder(join(folder, 'file/below'))).rejects.toMatchObject({ code: 'ENOTDIR' });
  await expect(makeFolder(join(folder, 'link'))).rejects.toMatchObject({ code: 'EEXIST' });
});

test.runIf(existsSync('/proc'))(
  'a file system that holds no folders refuses in place of an endless search',
  async () => {
    await expect(makeFolder('/proc/out.part/steps')).rejects.toMatchObject({ code: 'ENOENT' });
  },
);
