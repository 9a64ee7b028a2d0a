import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { loadNative } from '../../../src/backend/native.js';
import { provideScanner } from '../../../src/base/scanner.js';
import { buildSafetensorsHeader } from '../../../src/formats/safetensors.js';
import { openCheckpoint } from '../../../src/checkpoint/open.js';
import { badInputMessage } from '../../support/refusal.js';

const fixtures = fileURLToPath(new URL('../../../fixtures/formats/', import.meta.url));
let folder: string;
beforeEach(() => (folder = mkdtempSync(join(tmpdir(), 'open-'))));
afterEach(() => rmSync(folder, { recursive: true }));

const at = (...parts: string[]): string => join(folder, ...parts);
const message = (path: string, options?: object): Promise<string> => badInputMessage(openCheckpoint(path, options));
function put(name: string, content: string | Buffer | object): void {
  const isText = typeof content === 'string' || Buffer.isBuffer(content);
  writeFileSync(at(name), isText ? content : JSON.stringify(content));
}
/** A safetensors file of f32 tensors with two elements each. */
function weights(name: string, ...tensors: string[]): void {
  const plan = tensors.map((tensor) => ({ name: tensor, shape: [2], dtype: 'F32' }));
  const { header, size } = buildSafetensorsHeader(plan);
  put(name, Buffer.concat([header, Buffer.alloc(size - header.length)]));
}
const torchFile = (name: string): void => cpSync(join(fixtures, 'torch/views.bin'), at(name));
const llama = { model_type: 'llama' };

describe.each([
  ['by the native scanner', () => loadNative().scanner],
  ['as any JSON', () => undefined],
])('headers and indexes read %s', (_, load) => {
  beforeEach(() => provideScanner(load));

  describe('openCheckpoint', () => {
    it('opens folders: single, sharded with index, sharded without, PyTorch with index', async () => {
      put('config.json', llama);
      weights('model.safetensors', 'a', 'b');
      expect([...(await openCheckpoint(folder)).tensors.keys()]).toEqual(['a', 'b']);

      rmSync(at('model.safetensors'));
      weights('model-00001-of-00002.safetensors', 'a');
      weights('model-00002-of-00002.safetensors', 'b');
      const loose = await openCheckpoint(folder);
      expect([loose.tensors.size, loose.notes[0]]).toEqual([2, 'The folder has no index; all 2 shards were read.']);

      const map = { a: 'model-00001-of-00002.safetensors', b: 'model-00002-of-00002.safetensors' };
      put('model.safetensors.index.json', { metadata: {}, weight_map: map });
      const sharded = await openCheckpoint(folder);
      expect(sharded.files.map((path) => basename(path))).toEqual(Object.values(map));
      expect(sharded.notes).toEqual([]);
      expect((await openCheckpoint(at('model.safetensors.index.json'))).fingerprint).toBe(sharded.fingerprint);

      for (const name of [...Object.values(map), 'model.safetensors.index.json']) rmSync(at(name));
      torchFile('pytorch_model-00001-of-00001.bin');
      const names = Object.fromEntries(['step', 'offset'].map((name) => [name, 'pytorch_model-00001-of-00001.bin']));
      put('pytorch_model.bin.index.json', { weight_map: names });
      expect((await openCheckpoint(folder)).format).toBe('torch');
    });

    it('finds the config of a lone file: its own, then config.json, unless one is given', async () => {
      torchFile('v1.bin');
      put('config.json', { model_type: 'beside' });
      put('other.json', { model_type: 'given' });
      expect((await openCheckpoint(at('v1.bin'))).config['model_type']).toBe('beside');
      put('v1.config.json', { model_type: 'own' });
      expect((await openCheckpoint(at('v1.bin'))).config['model_type']).toBe('own');
      expect((await openCheckpoint(at('v1.bin'), { config: at('other.json') })).config['model_type']).toBe('given');
    });

    it('names the places where a missing config was looked for', async () => {
      torchFile('v1.bin');
      const text = await message(at('v1.bin'));
      for (const part of [at('v1.config.json'), at('config.json'), '--config']) expect(text).toContain(part);
      expect((await openCheckpoint(at('v1.bin'), { configOptional: true })).config).toEqual({});
      expect(await message(at('v1.bin'), { config: at('no.json') })).toContain('no such file');
    });

    it('reads configs that Python wrote, and refuses damaged ones', async () => {
      torchFile('v1.bin');
      put('config.json', '{"limit": Infinity, "max": 1000000000000000019884624838656}');
      expect((await openCheckpoint(at('v1.bin'))).config).toEqual({ limit: Infinity, max: 1e30 });
      put('config.json', '{"a": 1,');
      expect(await message(at('v1.bin'))).toContain('Bad JSON');
      put('config.json', '[]');
      expect(await message(at('v1.bin'))).toContain('no JSON object');
    });

    it('goes by content, not by name, and says so', async () => {
      put('config.json', llama);
      weights('model.bin', 'a');
      const renamed = await openCheckpoint(at('model.bin'));
      expect(renamed.format).toBe('safetensors');
      expect(renamed.notes[0]).toContain('named like a torch file but is a safetensors file');
      torchFile('weights.safetensors');
      expect((await openCheckpoint(at('weights.safetensors'))).format).toBe('torch');
      torchFile('noending');
      expect((await openCheckpoint(at('noending'))).notes).toEqual([]);
    });

    it('carries the tokenizer along; for a lone file its own before the common one', async () => {
      torchFile('v1.bin');
      for (const name of [
        'config.json',
        'tokenizer.json',
        'v1.tokenizer.json',
        'chat_template.jinja',
        'notes.txt',
        'modeling_x.py',
      ]) {
        put(name, {});
      }
      const names = (await openCheckpoint(at('v1.bin'))).companions.map((path) => basename(path));
      expect(names).toEqual(['v1.tokenizer.json', 'chat_template.jinja', 'modeling_x.py']);
    });

    it('has a fingerprint of headers, config and names, not of weights', async () => {
      put('config.json', llama);
      weights('model.safetensors', 'a');
      const before = (await openCheckpoint(folder)).fingerprint;
      const bytes = readFileSync(at('model.safetensors'));
      bytes[bytes.length - 1] = 1;
      put('model.safetensors', bytes);
      expect((await openCheckpoint(folder)).fingerprint).toBe(before);
      put('config.json', { model_type: 'other' });
      expect((await openCheckpoint(folder)).fingerprint).not.toBe(before);
    });

    it('notices inputs that change while they are read', async () => {
      put('config.json', llama);
      weights('model.safetensors', 'a');
      const checkpoint = await openCheckpoint(folder);
      await checkpoint.assertUnchanged();
      utimesSync(at('model.safetensors'), new Date(), new Date(1e12));
      expect(await badInputMessage(checkpoint.assertUnchanged())).toContain('was changed while it was read');
    });
  });

  describe('bad checkpoints', () => {
    it('paths that lead nowhere, empty folders, folders without weights', async () => {
      expect(await message(at('nope'))).toContain('no such file or folder');
      expect(await message(folder)).toContain('an empty folder');
      put('config.json', llama);
      put('training_args.bin', 'x');
      expect(await message(folder)).toContain('No weights in the folder');
    });

    it('several files and no index', async () => {
      weights('one.safetensors', 'a');
      weights('two.safetensors', 'b');
      expect(await message(folder)).toContain('one.safetensors, two.safetensors');
    });

    it('what is not a checkpoint at all', async () => {
      const files: [string, string | Buffer, string][] = [
        ['lfs.safetensors', 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n', 'git lfs pull'],
        ['page.bin', '<!DOCTYPE html><html>', 'web page'],
        ['old.bin', Buffer.concat([Buffer.from('tjgg'), Buffer.alloc(60)]), 'August 2023'],
        ['empty.bin', '', 'empty'],
        ['text.bin', 'hello, this is some text file', 'Unknown file format'],
        ['keras.h5', Buffer.concat([Buffer.from('\x89HDF\r\n', 'latin1'), Buffer.alloc(60)]), 'HDF5'],
        ['zeros.bin', Buffer.alloc(4096), 'Unknown file format'],
      ];
      for (const [name, content, expected] of files) {
        put(name, content);
        expect(await message(at(name)), name).toContain(expected);
      }
    });

    it('weight_map with separators, "..", absolute paths and links out of the folder', async () => {
      put('config.json', llama);
      weights('a.safetensors', 'a');
      for (const name of ['../a.safetensors', 'sub/a.safetensors', '/etc/passwd', '..', '', 'a\0b', 'c:\\x', 7]) {
        put('model.safetensors.index.json', { weight_map: { a: name } });
        expect(await message(folder), String(name)).toContain('plain files of the same folder');
      }
      const outside = mkdtempSync(join(tmpdir(), 'outside-'));
      cpSync(at('a.safetensors'), join(outside, 'a.safetensors'));
      symlinkSync(join(outside, 'a.safetensors'), at('link.safetensors'));
      put('model.safetensors.index.json', { weight_map: { a: 'link.safetensors' } });
      expect(await message(folder)).toContain('link out of the folder');
      rmSync(outside, { recursive: true });
      put('model.safetensors.index.json', { weight_map: { a: 'missing.safetensors' } });
      expect(await message(folder)).toContain('missing.safetensors');
    });

    it('but the links of a Hugging Face cache are as they should be', async () => {
      mkdirSync(at('blobs'));
      mkdirSync(at('snapshots', 'abc'), { recursive: true });
      weights('blobs/0123', 'a');
      symlinkSync('../../blobs/0123', at('snapshots/abc/model-00001-of-00001.safetensors'));
      put('snapshots/abc/config.json', llama);
      put('snapshots/abc/model.safetensors.index.json', { weight_map: { a: 'model-00001-of-00001.safetensors' } });
      expect((await openCheckpoint(at('snapshots/abc'))).tensors.size).toBe(1);
    });

    it('an index that disagrees with its shards, or is none', async () => {
      put('config.json', llama);
      weights('x.safetensors', 'a');
      weights('y.safetensors', 'b');
      put('model.safetensors.index.json', {
        weight_map: { a: 'x.safetensors', b: 'y.safetensors', c: 'y.safetensors' },
      });
      expect(await message(folder)).toContain('tensor "c"');
      put('model.safetensors.index.json', { weight_map: { a: 'y.safetensors', b: 'x.safetensors' } });
      expect(await message(folder)).toContain('not where it should be');
      weights('y.safetensors', 'a');
      put('model.safetensors.index.json', { weight_map: { a: 'x.safetensors', b: 'y.safetensors' } });
      expect(await message(folder)).toContain('in two files');
      put('model.safetensors.index.json', '{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}');
      expect(await message(folder)).toContain('Duplicate key');
      weights('y.safetensors', 'b');
      // Both that disagree with the shards and those that would not.
      for (const twice of [
        '"a":"y.safetensors","a":"x.safetensors"',
        '"a":"x.safetensors","\\u0061":"x.safetensors"',
      ]) {
        put('model.safetensors.index.json', `{"weight_map":{${twice},"b":"y.safetensors"}}`);
        expect(await message(folder)).toContain('Duplicate key "a"');
      }
      const many = Object.fromEntries(Array.from({ length: 100_001 }, (_, i) => [i, `${i}.safetensors`]));
      put('model.safetensors.index.json', { weight_map: many });
      expect(await message(folder)).toContain('too many files');
      put('model.safetensors.index.json', { weights: {} });
      expect(await message(folder)).toContain('no weight_map');
      put('model.safetensors.index.json', { weight_map: {} });
      expect(await message(folder)).toContain('no tensors');
    });

    it('an index may list tensors in any order', async () => {
      put('config.json', llama);
      weights('x.safetensors', 'a', 'b', 'c');
      weights('y.safetensors', 'd');
      const file = 'x.safetensors';
      put('model.safetensors.index.json', { weight_map: { c: file, d: 'y.safetensors', b: file, a: file } });
      const checkpoint = await openCheckpoint(folder);
      expect([...checkpoint.tensors.keys()]).toEqual(['a', 'b', 'c', 'd']);
      await checkpoint.close();
      put('model.safetensors.index.json', { weight_map: { a: file, b: file, d: file } });
      expect(await message(folder)).toContain('tensor "d"');
    });

    it('missing shards of a series', async () => {
      put('config.json', llama);
      weights('model-00001-of-00003.safetensors', 'a');
      weights('model-00003-of-00003.safetensors', 'c');
      expect(await message(folder)).toContain('model-00002-of-00003.safetensors');
      rmSync(at('model-00001-of-00003.safetensors'));
      rmSync(at('model-00003-of-00003.safetensors'));
      weights('model0-mp2.safetensors', 'a');
      expect(await message(folder)).toContain('model1-mp2.safetensors');
    });

    it('shards of different formats', async () => {
      put('config.json', llama);
      weights('x.safetensors', 'a');
      torchFile('y.safetensors');
      put('model.safetensors.index.json', { weight_map: { a: 'x.safetensors', step: 'y.safetensors' } });
      expect(await message(folder)).toContain('different formats');
    });

    it('a tensor called __proto__ is a tensor like any other', async () => {
      put('config.json', '{"__proto__":{"polluted":true}}');
      weights('x.safetensors', '__proto__');
      put('model.safetensors.index.json', '{"weight_map":{"__proto__":"x.safetensors"}}');
      const checkpoint = await openCheckpoint(folder);
      expect([...checkpoint.tensors.keys()]).toEqual(['__proto__']);
      expect(({} as Record<string, unknown>)['polluted']).toBeUndefined();
    });
  });
});
