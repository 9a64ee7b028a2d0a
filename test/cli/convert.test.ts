import { createHash } from 'node:crypto';
import { cpSync, existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { f32, readTensors, writeTensors, type StoredTensor } from './files.js';
import { cli, fixture, json, listing, v1, workFolder } from './support.js';

const folder = workFolder();
const torchNames: Record<string, string> = { F16: 'torch.float16', F32: 'torch.float32', BF16: 'torch.bfloat16' };
const expected = (JSON.parse(readFileSync(fixture('convert.json'), 'utf8')) as { sha256: Record<string, string> })
  .sha256;

/** As fixtures/make_convert.py computes it. */
function digest(tensors: ReadonlyMap<string, StoredTensor>): string {
  const hash = createHash('sha256');
  for (const name of [...tensors.keys()].sort()) {
    const { dtype, shape, data } = tensors.get(name)!;
    hash.update(`${name} [${shape.join(', ')}] ${torchNames[dtype]}\n`).update(data);
  }
  return hash.digest('hex');
}

const folderTensors = (path: string): Map<string, StoredTensor> =>
  new Map(readdirSync(path).filter((name) => name.endsWith('.safetensors')).flatMap((name) => [...readTensors(join(path, name))])); // prettier-ignore

async function converted(input: string, out: string, ...flags: string[]): Promise<Record<string, unknown>> {
  const finished = await cli(['convert', input, '-o', join(folder, out), ...flags, '--json']);
  expect(finished.stderr + finished.stdout).not.toContain('"ok":false');
  expect(finished.code).toBe(0);
  return json(finished);
}

describe('convert', () => {
  it.each(['f16', 'f32', 'bf16'])('casts to %s as PyTorch does', async (dtype) => {
    await converted(fixture('moe-6m'), dtype, '--dtype', dtype);
    expect(digest(folderTensors(join(folder, dtype)))).toBe(expected[dtype]);
    const config = JSON.parse(readFileSync(join(folder, dtype, 'config.json'), 'utf8')) as Record<string, unknown>;
    expect(config.dtype).toBe({ f16: 'float16', f32: 'float32', bf16: 'bfloat16' }[dtype]);
    expect(existsSync(join(folder, dtype, 'tokenizer.json'))).toBe(true);
  });
  it('splits into shards and merges them again, through a PyTorch file, without changing a bit', async () => {
    const { out } = await converted(fixture('moe-6m'), 'shards', '--shard-size', '3MB');
    const shards = readdirSync(out as string).filter((name) => name.endsWith('.safetensors'));
    expect(shards.length).toBeGreaterThan(3);
    expect(digest(folderTensors(out as string))).toBe(expected.bf16);
    mkdirSync(join(folder, 'one'));
    await converted(out as string, 'one/merged.bin');
    expect(listing(join(folder, 'one'))).toContain('merged.config.json');
    await converted(join(folder, 'one/merged.bin'), 'again');
    expect(digest(folderTensors(join(folder, 'again')))).toBe(expected.bf16);
  });
  it('gives the same bytes each time, with as much or as little memory in flight', async () => {
    const files = ['a', 'b'].map((name) => join(folder, name, 'model.safetensors'));
    await converted(v1, 'a', '--threads', '1', '--io-budget', '8MB');
    await converted(v1, 'b');
    expect(readFileSync(files[0]!).equals(readFileSync(files[1]!))).toBe(true);
  });
  it('records what was asked for', async () => {
    const { options, command } = (
      JSON.parse(readFileSync(join(folder, 'f16/deepseek-convert.json'), 'utf8')) as {
        recipe: { command: string; options: Record<string, unknown> };
      }
    ).recipe;
    expect(command).toBe('convert');
    expect(options).toMatchObject({ dtype: 'f16', shardSize: 5e9, input: fixture('moe-6m') });
  });
});

describe('convert --dry-run', () => {
  it('says what would be done and writes nothing', async () => {
    const plan = await converted(fixture('moe-6m'), 'dry', '--dtype', 'f32', '--dry-run');
    const tensors = plan.tensors as { name: string; action: string; from: string; to: string; writes: number }[];
    expect(tensors).toHaveLength(129);
    expect(tensors.find(({ name }) => name.endsWith('e_score_correction_bias'))).toMatchObject({
      action: 'copy',
      to: 'f32',
    });
    expect(tensors.find(({ name }) => name === 'model.norm.weight')).toMatchObject({
      action: 'cast',
      from: 'bf16',
      to: 'f32',
    });
    const [file] = plan.files as { bytes: number }[];
    expect(file!.bytes).toBe(readFileSync(join(folder, 'f32/model.safetensors')).length);
    expect(listing(folder).filter((name) => name.startsWith('dry'))).toEqual([]);
  });
});

describe('values', () => {
  /** One tensor with odd values, as a checkpoint. */
  function made(name: string, ...values: number[]): string {
    const path = join(folder, name);
    mkdirSync(path);
    cpSync(fixture('v1.0/v1.0_checkpoint.config.json'), join(path, 'config.json'));
    writeTensors(join(path, 'model.safetensors'), new Map([
      ['fine.weight', { dtype: 'F32', shape: [2], data: f32(1, 2) }],
      ['odd.weight', { dtype: 'F32', shape: [values.length], data: f32(...values) }],
    ])); // prettier-ignore
    return path;
  }
  it('that the new type cannot hold fail, with their number, unless they are accepted', async () => {
    const path = made('large', 65504, 70000, -1e30, 65519, 0);
    const args = ['convert', path, '-o', join(folder, 'large16'), '--dtype', 'f16'];
    const refused = await cli(args);
    expect(refused.code).toBe(3);
    expect(refused.stderr).toMatch(/odd\.weight.*got 2 values/);
    expect(listing(folder).filter((name) => name.startsWith('large16'))).toEqual([]);
    const accepted = await cli([...args, '--allow-saturation', '--json']);
    expect(json(accepted)).toMatchObject({ ok: true, saturated: { 'odd.weight': 2 } });
    expect(accepted.stderr).toContain('odd.weight: 2 values became infinite');
    const { data } = readTensors(join(folder, 'large16/model.safetensors')).get('odd.weight')!;
    expect([...new Uint16Array(Uint8Array.from(data).buffer)]).toEqual([0x7bff, 0x7c00, 0xfc00, 0x7bff, 0]);
  });
  it.each([
    ['nan', NaN],
    ['infinity', -Infinity],
  ])('that are %s are refused, copied or cast', async (name, value) => {
    const path = made(name, 1, value, 2);
    for (const flags of [[], ['--dtype', 'bf16']]) {
      const { code, stderr } = await cli(['convert', path, '-o', join(folder, `${name}-out`), ...flags]);
      expect(code).toBe(1);
      expect(stderr).toContain('not finite: tensor odd.weight');
      expect(listing(folder).filter((file) => file.startsWith(`${name}-out`))).toEqual([]);
    }
  });
});

describe('an output that exists', () => {
  it('is refused, and replaced with --overwrite', async () => {
    await converted(v1, 'there');
    const { code, stderr } = await cli(['convert', v1, '-o', join(folder, 'there'), '--dtype', 'f16']);
    expect(code).toBe(1);
    expect(stderr).toMatch(/exists already[^]*--overwrite/);
    expect(readTensors(join(folder, 'there/model.safetensors')).get('model.norm.weight')!.dtype).toBe('BF16');
    await converted(v1, 'there', '--dtype', 'f16', '--overwrite');
    expect(readTensors(join(folder, 'there/model.safetensors')).get('model.norm.weight')!.dtype).toBe('F16');
  });
  it("never loses another model's config", async () => {
    const place = join(folder, 'shared-folder');
    mkdirSync(place);
    writeFileSync(join(place, 'config.json'), '{"model_type":"other"}');
    await converted(v1, 'shared-folder/new.bin');
    expect(readFileSync(join(place, 'config.json'), 'utf8')).toBe('{"model_type":"other"}');
    expect(existsSync(join(place, 'new.config.json'))).toBe(true);
  });
});

describe('names and formats', () => {
  it.each([
    [['-o', 'x.bin', '--format', 'safetensors'], 'disagree'],
    [['-o', 'x.onnx'], 'An ONNX model is a folder'],
    [['-o', 'x', '--dtype', 'q8_0'], 'a block type of GGUF files'],
    [[], '-o (--out) <path> is missing'],
    [['-o', 'x', '--dtype', 'int4'], 'Invalid value for --dtype: expected bf16, f16, f32'],
  ])('%j', async (flags, message) => {
    const { code, stderr } = await cli(['convert', v1, ...flags], { cwd: folder });
    expect(stderr).toContain(message);
    expect(code).toBe(2);
  });
});
