import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { Cursor } from '../../../src/formats/cursor.js';
import { pickleLimits, unpickle } from '../../../src/formats/pickle.js';
import { op } from '../../../src/formats/pickle-ops.js';
import type { PyValue } from '../../../src/formats/pickle-values.js';
import { inMemory } from '../../../src/formats/source.js';
import { readTorch, torchRefusals } from '../../../src/formats/torch.js';
import { torchAllows, torchConstruct } from '../../../src/formats/torch-values.js';
import { PickleBuilder, pickledDict } from '../../support/pickle.js';
import { badInputMessage } from '../../support/refusal.js';
import { torchZip, zip } from '../../support/zip.js';

const sixteen = { 0: Buffer.alloc(16) };
const message = (file: Buffer): Promise<string> => badInputMessage(() => readTorch(inMemory(file, 'evil.bin')));
const pickleMessage = (pickle: Buffer): Promise<string> => message(torchZip(pickle, sixteen));
const tensors = (...args: Parameters<PickleBuilder['tensor']>[]): Buffer =>
  pickledDict((b) => args.reduce((builder, one) => builder.tensor(...one), b));
const value = (pickle: Buffer, limits = pickleLimits): PyValue =>
  unpickle(new Cursor(inMemory(pickle, 'p'), 'pickle'), {
    allows: torchAllows,
    construct: torchConstruct,
    persistent: (id) => id,
    limits,
  });

describe('hostile pickles', () => {
  it('os.system by GLOBAL and REDUCE, by STACK_GLOBAL, by INST and by OBJ', async () => {
    const build = (): PickleBuilder => new PickleBuilder();
    const evil = [
      build().global('os', 'system').raw(op.MARK).text('touch /evil').raw(op.TUPLE, op.REDUCE).done(),
      build().text('os').text('system').raw(op.STACK_GLOBAL, op.MARK).text('x').raw(op.TUPLE, op.REDUCE).done(),
      build().raw(op.MARK).text('x').raw(op.INST, 'os\nsystem\n').done(),
      build().raw(op.MARK).global('os', 'system').text('x').raw(op.OBJ).done(),
      build().global('os', 'system').raw(op.EMPTY_TUPLE, op.NEWOBJ).done(),
      build().global('os', 'system').done(), // merely named
    ];
    for (const pickle of evil) expect(await pickleMessage(pickle)).toContain('os.system');
    expect(existsSync('/evil')).toBe(false);
  });

  it('names all that is refused, with positions, and runs a chain of calls to its end without running anything', () => {
    const pickle = new PickleBuilder()
      .global('builtins', 'eval').raw(op.MARK).text('1').raw(op.TUPLE, op.REDUCE, op.POP)
      .global('builtins', 'getattr').raw(op.EMPTY_TUPLE, op.REDUCE, op.EMPTY_TUPLE, op.REDUCE)
      .raw(op.EMPTY_DICT, op.BUILD).done(); // prettier-ignore
    const refused = torchRefusals(inMemory(torchZip(pickle), 'x'));
    expect(refused.map(({ name }) => name)).toEqual(['builtins.eval', 'builtins.getattr']);
    expect(refused[0]!.position).toBeLessThan(refused[1]!.position);
  });

  it('look-alikes of allowed names', async () => {
    for (const [module, name] of [
      ['torch._utils', '_rebuild_tensor_v2.__globals__'],
      ['torch', 'load'],
      ['torch.storage', '_load_from_bytes'],
      ['torch.storage', 'UntypedStorage.from_file'],
      ['collections', 'OrderedDict.__init__'],
      ['collections\0', 'OrderedDict'],
      ['Collections', 'OrderedDict'],
      ['torch', 'hub'],
      ['torch.serialization', 'load'],
      ['builtins', 'exec'],
      ['__builtin__', 'eval'],
    ] as const) {
      const pickle = new PickleBuilder().text(module).text(name).raw(op.STACK_GLOBAL).done();
      expect(await pickleMessage(pickle), name).toContain('outside the allow-list');
    }
  });

  it('extension and buffer opcodes, unknown opcodes, unknown protocols', async () => {
    for (const code of [op.EXT1, op.EXT2, op.EXT4, op.NEXT_BUFFER, op.READONLY_BUFFER, 0xff, 0x00]) {
      expect(await pickleMessage(new PickleBuilder().raw(code, '\x01\x00\x00\x00').done())).toContain(
        'is not accepted',
      );
    }
    expect(await pickleMessage(new PickleBuilder().raw(op.PROTO, 6).done())).toContain('protocol 6');
  });

  it('a broken stack, missing marks and memos', async () => {
    const bad: [string, PickleBuilder][] = [
      ['stack is empty', new PickleBuilder()],
      ['stack is empty', new PickleBuilder().raw(op.MARK)],
      ['mark is missing', new PickleBuilder().raw(op.TUPLE)],
      ['stack is empty', new PickleBuilder().raw(op.MARK, op.TUPLE1)],
      ['Memo 7 is not set', new PickleBuilder().raw(op.BINGET, 7)],
      ['no list', new PickleBuilder().raw(op.NONE, op.NONE, op.APPEND)],
      ['no dictionary', new PickleBuilder().raw(op.NONE, op.NONE, op.NONE, op.SETITEM)],
      ['A key without a value', new PickleBuilder().raw(op.EMPTY_DICT, op.MARK, op.NONE, op.SETITEMS)],
      ['no tuple', new PickleBuilder().global('collections', 'OrderedDict').raw(op.NONE, op.REDUCE)],
      ['no global', new PickleBuilder().raw(op.NONE, op.EMPTY_TUPLE, op.REDUCE)],
    ];
    for (const [text, builder] of bad) expect(await pickleMessage(builder.done())).toContain(text);
  });

  it('lengths far beyond the file, before anything is allocated', async () => {
    const huge = Buffer.alloc(8, 0xff);
    for (const code of [op.BINUNICODE8, op.BINBYTES8, op.BYTEARRAY8]) {
      expect(await pickleMessage(new PickleBuilder().raw(code, huge).done())).toContain('ends too early');
    }
    expect(await pickleMessage(new PickleBuilder().raw(op.BINBYTES, '\xff\xff\xff\x7f').done())).toContain(
      'ends too early',
    );
    expect(await pickleMessage(new PickleBuilder().raw(op.LONG4, huge.subarray(0, 4)).done())).toContain(
      '4294967295 bytes',
    );
    expect(await pickleMessage(new PickleBuilder().raw(op.LONG, '9'.repeat(5000), '\n').done())).toContain('too long');
  });

  it('bombs: deep marks, a million dictionaries, doubling tuples, endless opcodes', async () => {
    expect(await pickleMessage(new PickleBuilder().raw(Buffer.alloc(5000, op.MARK)).done())).toContain(
      'Nested too deeply',
    );
    const doubling = new PickleBuilder().raw(op.NONE);
    for (let i = 0; i < 10_000; i++) doubling.raw(op.DUP, op.TUPLE2);
    expect(await pickleMessage(doubling.done())).toContain('no state dict');
    const limits = { opcodes: 1000, objects: 500, memo: 100, marks: 1000 };
    const limited = (code: Buffer): Promise<string> =>
      badInputMessage(() => value(new PickleBuilder().raw(code).done(), limits));
    expect(await limited(Buffer.alloc(600, op.EMPTY_DICT))).toContain('More than 500 objects');
    expect(await limited(Buffer.alloc(1100, 'N0'))).toContain('More than 1000 opcodes');
    expect(await limited(Buffer.concat([Buffer.from('N'), Buffer.alloc(200, op.MEMOIZE)]))).toContain(
      'More than 100 memo',
    );
  });

  it('__proto__ as a key and as an attribute', () => {
    const pickle = pickledDict((b) => b.text('__proto__').raw(op.EMPTY_DICT).text('polluted').raw(op.NEWTRUE));
    const dict = value(pickle);
    expect(dict).toBeInstanceOf(Map);
    expect((dict as Map<string, unknown>).get('polluted')).toBe(true);
    value(
      new PickleBuilder()
        .raw(op.EMPTY_DICT, op.EMPTY_DICT, op.MARK)
        .text('__proto__')
        .raw(op.EMPTY_DICT, op.SETITEMS, op.BUILD)
        .done(),
    );
    expect(({} as Record<string, unknown>)['polluted']).toBeUndefined();
  });

  it('reads protocol 0 text as Python does', () => {
    const lines = "(dp0\nS'a\\x41\\n'\np1\nI7\nsVn\\u00e9\np2\nL123456789012345678901L\nsI01\nF-1.5e3\ns.";
    expect(value(Buffer.from(lines))).toEqual(
      new Map<unknown, unknown>([['aA\n', 7], ['né', 123456789012345678901n], [true, -1500]]),
    ); // prettier-ignore
  });
});

describe('hostile tensors', () => {
  it('strides and offsets beyond the storage, negative ones, mismatched ones', async () => {
    expect(await message(torchZip(tensors(['w', [4], [1]]), sixteen)).catch(() => 'accepted')).toBe('accepted');
    expect(await message(torchZip(tensors(['w', [5], [1]]), sixteen))).toContain('beyond its storage');
    expect(await message(torchZip(tensors(['w', [2, 2], [3, 1]]), sixteen))).toContain('got element 5');
    expect(await message(torchZip(tensors(['w', [2], [1], { offset: 3 }]), sixteen))).toContain('beyond its storage');
    expect(await message(torchZip(tensors(['w', [2], [-1]]), sixteen))).toContain('non-negative');
    expect(await message(torchZip(tensors(['w', [2], [1], { offset: -1 }]), sixteen))).toContain('non-negative');
    expect(await message(torchZip(tensors(['w', [2, 2], [1]]), sixteen))).toContain('different lengths');
    expect(await message(torchZip(tensors(['w', Array.from({ length: 20 }, () => 1), [1]]), sixteen))).toContain(
      '20 dimensions',
    );
  });

  it('shapes whose product overflows', async () => {
    expect(await message(torchZip(tensors(['w', [2 ** 40, 2 ** 40], [0, 0]]), sixteen))).toContain(
      'beyond its storage',
    );
    expect(await message(torchZip(tensors(['w', [2 ** 40], [2 ** 40]]), sixteen))).toContain('beyond its storage');
  });

  it('a storage that is missing, or smaller than the pickle says', async () => {
    expect(await message(torchZip(tensors(['w', [4], [1], { key: '1' }]), sixteen))).toContain('missing');
    expect(await message(torchZip(tensors(['w', [4], [1], { count: 5 }]), sixteen))).toContain(
      'smaller than the pickle says',
    );
  });

  it('one storage claimed a million times, by strides of zero and by many tensors', async () => {
    expect(await message(torchZip(tensors(['w', [2 ** 33], [0]]), sixteen))).toContain('claim one storage');
    const many = Array.from({ length: 100 }, (_, i): [string, number[], number[]] => [`w${i}`, [2 ** 18], [0]]);
    expect(await message(torchZip(tensors(...many), sixteen))).toContain('claim one storage');
  });

  it('two tensors of one name', async () => {
    const bytesKey = pickledDict((b) => {
      const dict = b.tensor('w', [1], [1]).raw(op.SHORT_BINBYTES, 1, 'w');
      return dict.global('torch._utils', '_rebuild_tensor_v2').raw(op.MARK).storage('0', 4).integer(0).integers([1]).integers([1]).raw(op.NEWFALSE, op.EMPTY_DICT, op.TUPLE, op.REDUCE);
    }); // prettier-ignore
    expect(await message(torchZip(bytesKey, sixteen))).toContain('Two tensors of one name');
  });

  it('files without tensors say what they hold', async () => {
    expect(await pickleMessage(pickledDict((b) => b.text('epoch').integer(3)))).toContain('a dictionary with "epoch"');
    expect(await pickleMessage(new PickleBuilder().raw(op.NONE).done())).toContain('got None');
  });
});

describe('hostile archives', () => {
  const pickle = tensors(['w', [4], [1]]);
  const data = { name: 'x/data/0', data: Buffer.alloc(16) };
  const pkl = { name: 'x/data.pkl', data: pickle };

  it('compressed and encrypted entries', async () => {
    expect(await message(zip([{ ...pkl, method: 8 }, data]))).toContain('method 8');
    expect(await message(zip([pkl, { ...data, flags: 1 }]))).toContain('encrypted');
    expect(await message(zip([pkl, { ...data, local: { method: 8 } }]))).toContain('method 8');
  });

  it('duplicate entries', async () => {
    expect(await message(zip([pkl, data, data]))).toContain('two entries named "x/data/0"');
  });

  it('local headers that disagree with the central directory', async () => {
    expect(await message(zip([pkl, { ...data, local: { name: 'x/data/1' } }]))).toContain('another name');
    expect(await message(zip([pkl, { ...data, local: { size: 8 } }]))).toContain('disagree');
    expect(await message(zip([pkl, { ...data, local: { crc: 1 } }]))).toContain('disagree');
    expect(await message(zip([pkl, { ...data, local: { flags: 8 } }]))).toContain('other flags');
    expect(await message(zip([pkl, { ...data, central: { size: 12 } }]))).toContain('disagree');
    expect(await message(zip([pkl, { ...data, central: { stored: 12 } }]))).toContain('another size');
  });

  it('entries that overlap or point elsewhere', async () => {
    expect(await message(zip([pkl, { ...data, name: 'x/data.pkm', central: { offset: 0 } }]))).toContain(
      'another name',
    );
    const twice = zip([pkl, data, { ...data, name: 'x/data/0' }]);
    expect(await message(twice)).toContain('two entries');
    expect(await message(zip([pkl, { ...data, central: { offset: 5 } }]))).toContain('no local header');
    expect(await message(zip([pkl, { ...data, central: { offset: 0xfffffff0 } }]))).toContain('ends before');
  });

  it('wrong counts, places and endings of the directory; several volumes', async () => {
    expect(await message(zip([pkl, data], { count: 3 }))).toContain('fewer entries');
    expect(await message(zip([pkl, data], { count: 1 }))).toContain('between the central directory and its end');
    expect(await message(zip([pkl, data], { start: 10 }))).toContain('not where it should be');
    expect(await message(zip([pkl, { ...data, central: { disk: 1 } }]))).toContain('several volumes');
    const whole = zip([pkl, data]);
    expect(await message(whole.subarray(0, whole.length - 1))).toContain('no end record');
    expect(await message(Buffer.concat([whole, Buffer.from('x')]))).toContain('no end record');
  });

  it('accepts an archive with a comment', () => {
    expect(readTorch(inMemory(zip([pkl, data], { comment: 'hello' }), 'x')).tensors).toHaveLength(1);
  });

  it('archives that are no checkpoint', async () => {
    expect(await message(zip([{ name: 'w.npy', data: Buffer.alloc(4) }]))).toContain('NumPy');
    expect(await message(torchZip(pickle, sixteen, [{ name: 'x/constants.pkl', data: Buffer.alloc(1) }]))).toContain(
      'TorchScript',
    );
    expect(await message(torchZip(pickle, sixteen, [{ name: 'x/byteorder', data: Buffer.from('big') }]))).toContain(
      'big-endian',
    );
    expect(await message(zip([pkl, { ...pkl, name: 'y/data.pkl' }, data]))).toContain('without one');
  });

  it('bytes after the pickle', async () => {
    expect(await pickleMessage(Buffer.concat([pickle, Buffer.from('x')]))).toContain('Bytes after the pickle');
  });

  it('reads an archive of ours that a common tool lists without complaint', () => {
    // The builder above must make valid archives where it does not lie, or these tests would test nothing.
    const file = zip([pkl, data]);
    expect(readTorch(inMemory(file, 'x')).tensors.map(({ name }) => name)).toEqual(['w']);
    const code = 'import sys,io,zipfile;print(zipfile.ZipFile(io.BytesIO(sys.stdin.buffer.read())).testzip())';
    const python = execFileSync('python3', ['-c', code], { input: file }).toString().trim();
    expect(python).toBe('None');
  });
});
