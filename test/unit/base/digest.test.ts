import { createHash } from 'node:crypto';
import { appendFileSync, mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { crc32 } from 'node:zlib';
import { afterAll, describe, expect, it } from 'vitest';
import { loadNative } from '../../../src/backend/native.js';
import { DigestWorker, NativeDigests, openDigests, type Digests } from '../../../src/base/digest.js';

const { Hasher } = loadNative();
if (!Hasher) console.log('no SHA instructions here: the native hasher is not tested');

const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** Bytes that repeat at no power of two. */
const bytesOf = (count: number, seed: number): Buffer => Buffer.from(Array.from({ length: count }, (_, i) => (i * seed) % 251)); // prettier-ignore
const sha256 = (bytes: Buffer): string => createHash('sha256').update(bytes).digest('hex');

const kinds: [string, () => Digests][] = [['Node', () => new DigestWorker()]];
if (Hasher) kinds.push(['the native core', () => new NativeDigests(new Hasher())]);

describe.each(kinds)('checksums by %s', (name, make) => {
  it('equal SHA-256 for every length around blocks and pieces, several files at once', async () => {
    const lengths = [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 131071, 131072, 131073, 400001];
    const owners = [make(), make()];
    const sums = await Promise.all(
      lengths.map(async (length, i) => {
        const path = join(folder, `${name}-${length}`);
        writeFileSync(path, bytesOf(length, i + 3));
        return owners[i % 2]!.finish(path);
      }),
    );
    expect(sums).toEqual(lengths.map((length, i) => sha256(bytesOf(length, i + 3))));
    for (const owner of owners) await owner.close();
  });

  it('follow a file that grows, in steps of any size, and begin anew', async () => {
    const digests = make();
    const path = join(folder, `${name}-grows`);
    writeFileSync(path, '');
    let all = Buffer.alloc(0);
    for (const step of [1, 70, 5, 131072, 3, 200000, 64, 0]) {
      const more = bytesOf(step, 7 + step);
      appendFileSync(path, more);
      all = Buffer.concat([all, more]);
      await digests.advance(path, all.length);
    }
    appendFileSync(path, 'end');
    expect(await digests.finish(path)).toBe(sha256(Buffer.concat([all, Buffer.from('end')])));
    await digests.advance(path, 5);
    writeFileSync(path, 'another text');
    await digests.restart(path);
    expect(await digests.finish(path)).toBe(sha256(Buffer.from('another text')));
    await digests.close();
  });

  it('name the file that is missing or too short', async () => {
    const digests = make();
    await expect(digests.finish(join(folder, 'none'))).rejects.toThrow(/checksum[^]*none/);
    const path = join(folder, `${name}-short`);
    writeFileSync(path, bytesOf(1000, 3));
    await digests.advance(path, 500);
    truncateSync(path, 700);
    await expect(digests.advance(path, 900)).rejects.toThrow(/short[^]*ends at byte 700, before byte 900/);
    await digests.close();
  });
});

it('a part has its CRC-32 where it is asked for', async () => {
  const digests = openDigests(true);
  const path = join(folder, 'crc');
  writeFileSync(path, bytesOf(300000, 11));
  await digests.advance(path, 100);
  expect(await digests.advance(path, 200100, true)).toBe(crc32(bytesOf(300000, 11).subarray(100, 200100)));
  expect(await digests.finish(path)).toBe(sha256(bytesOf(300000, 11)));
  await digests.close();
});
