import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { bytesSource, fileSource } from '../../../src/base/io.js';
import { Job } from '../../../src/base/job.js';
import { openCheckpoint } from '../../../src/checkpoint/open.js';
import type { CheckpointWriter, PlannedTensor } from '../../../src/checkpoint/types.js';
import { createWriter } from '../../../src/checkpoint/writer.js';
import type { WriterOptions } from '../../../src/checkpoint/writer.js';
import { refusal } from '../../support/refusal.js';

let folder: string;
beforeEach(() => (folder = mkdtempSync(join(tmpdir(), 'writer-'))));
afterEach(() => rmSync(folder, { recursive: true }));

const plan: PlannedTensor[] = [
  { name: 'embed', shape: [100, 8], dtype: 'bf16' },
  { name: 'layers.0.w', shape: [16, 3], dtype: 'f32' },
  { name: 'layers.0.empty', shape: [0, 4], dtype: 'f32' },
  { name: 'layers.1.w', shape: [5], dtype: 'u8' },
  { name: 'layers.1.scales', shape: [3], dtype: 'f8_e4m3' },
  { name: 'head', shape: [700], dtype: 'f16' },
];
const sizes = [1600, 192, 0, 5, 3, 1400];
/** Bytes that differ from tensor to tensor. */
const content = (name: string, bytes: number): Buffer =>
  Buffer.from(Array.from({ length: bytes }, (_, i) => (i * 7 + name.length * 31) & 255));
const contentOf = (i: number): Buffer => content(plan[i]!.name, sizes[i]!);

interface Output {
  job: Job;
  writer: CheckpointWriter;
}
const config = { model_type: 'llama', rms_norm_eps: 1e-6 };
async function start(out: string, more: Partial<WriterOptions> = {}, job: object = {}): Promise<Output> {
  const opened = await Job.open({ out: join(folder, out), fingerprint: { test: 1 }, ...job });
  const provenance = { tool: { name: 'test', version: '1' }, recipe: { a: 1 }, inputs: [] };
  try {
    const writer = await createWriter({
      job: opened,
      format: 'safetensors',
      tensors: plan,
      config,
      provenance,
      ...more,
    });
    return { job: opened, writer };
  } catch (error) {
    await opened.close();
    throw error;
  }
}
const put = (writer: CheckpointWriter, i: number): Promise<void> =>
  writer.write(plan[i]!.name, bytesSource(contentOf(i)));
async function complete({ job, writer }: Output, order = [3, 0, 5, 2, 1, 4]): Promise<void> {
  await Promise.all(order.map((i) => put(writer, i)));
  await writer.finish({ layers: [{ error: 0.5 }] });
  await job.remove();
}

async function requireContent(path: string): Promise<void> {
  const checkpoint = await openCheckpoint(path);
  expect(checkpoint.config).toEqual(config);
  expect([...checkpoint.tensors.keys()].sort()).toEqual(plan.map(({ name }) => name).sort());
  for (const [i, { name, shape, dtype }] of plan.entries()) {
    const { span, ...entry } = checkpoint.tensors.get(name)!;
    expect(entry).toEqual({ name, shape, encoding: { kind: 'plain', dtype } });
    const file = readFileSync(span.path);
    expect(file.subarray(span.offset, span.offset + span.bytes).equals(contentOf(i)), name).toBe(true);
  }
  await checkpoint.close();
}

const filesOf = (path: string): Record<string, string> =>
  Object.fromEntries(readdirSync(path).map((name) => [name, readFileSync(join(path, name), 'hex')]));

interface Provenance {
  outputs: { name: string; bytes: number; sha256: string }[];
  inputs: { name: string; sha256: string }[];
  recipe: unknown;
  layers: unknown;
}
function requireHashes(path: string, provenance: Provenance): void {
  for (const { name, bytes, sha256 } of provenance.outputs) {
    const data = readFileSync(join(path, name));
    expect([data.length, createHash('sha256').update(data).digest('hex')], name).toEqual([bytes, sha256]);
  }
}

describe('createWriter', () => {
  it('writes a folder, tensors in any order', async () => {
    const output = await start('model');
    expect(existsSync(join(folder, 'model'))).toBe(false);
    await complete(output);
    expect(readdirSync(folder)).toEqual(['model']);
    expect(readdirSync(join(folder, 'model')).sort()).toEqual([
      'config.json',
      'deepseek-convert.json',
      'model.safetensors',
    ]);
    await requireContent(join(folder, 'model'));
  });

  it('records the SHA-256 of inputs and outputs, the recipe and the report', async () => {
    const input = join(folder, 'input.bin');
    writeFileSync(input, 'weights');
    const provenance = { tool: { name: 'test', version: '1' }, recipe: { bits: 4 }, inputs: [input] };
    await complete(await start('model', { provenance, shardSize: 1000 }));
    const record = JSON.parse(readFileSync(join(folder, 'model/deepseek-convert.json'), 'utf8')) as Provenance;
    const sha256 = createHash('sha256').update('weights').digest('hex');
    expect(record).toMatchObject({ schema: 1, recipe: { bits: 4 }, inputs: [{ name: 'input.bin', sha256 }] });
    expect(record.layers).toEqual([{ error: 0.5 }]);
    expect(record.outputs.map(({ name }) => name)).toContain('model.safetensors.index.json');
    requireHashes(join(folder, 'model'), record);
  });

  it('shards in the order of the plan, with an index', async () => {
    await complete(await start('model', { shardSize: 1599 }));
    const index = JSON.parse(readFileSync(join(folder, 'model/model.safetensors.index.json'), 'utf8')) as {
      metadata: object;
      weight_map: Record<string, string>;
    };
    const [first, second] = ['model-00001-of-00003.safetensors', 'model-00002-of-00003.safetensors'];
    expect(index.metadata).toEqual({ total_size: 3200 });
    expect(index.weight_map['embed']).toBe(first);
    expect(index.weight_map['layers.0.w']).toBe(second);
    await requireContent(join(folder, 'model'));
  });

  it('writes a lone PyTorch file with its config beside it, tied tensors sharing one storage', async () => {
    const tensors = [...plan, { name: 'tied', shape: [100, 8], dtype: 'bf16', tiedTo: 'embed' } as const];
    const output = await start('v2.bin', { format: 'torch', tensors });
    expect((await refusal(output.writer.write('tied', bytesSource(contentOf(0))))).kind).toBe('internal');
    await complete(output);
    expect(readdirSync(folder).sort()).toEqual(['v2.bin', 'v2.config.json', 'v2.deepseek-convert.json']);
    const checkpoint = await openCheckpoint(join(folder, 'v2.bin'));
    expect(checkpoint.tensors.get('tied')!.span).toEqual(checkpoint.tensors.get('embed')!.span);
    const { offset, bytes } = checkpoint.tensors.get('head')!.span;
    expect(
      readFileSync(join(folder, 'v2.bin'))
        .subarray(offset, offset + bytes)
        .equals(contentOf(5)),
    ).toBe(true);
    requireHashes(folder, JSON.parse(readFileSync(join(folder, 'v2.deepseek-convert.json'), 'utf8')) as Provenance);
  });

  it("never replaces another model's config; its companions get a prefix", async () => {
    const from = join(folder, 'in');
    mkdirSync(from);
    writeFileSync(join(from, 'tokenizer.json'), 'ours');
    writeFileSync(join(from, 'merges.txt'), 'same');
    writeFileSync(join(folder, 'tokenizer.json'), 'theirs');
    writeFileSync(join(folder, 'merges.txt'), 'same');
    writeFileSync(join(folder, 'config.json'), 'theirs');
    const companions = ['tokenizer.json', 'merges.txt'].map((name) => join(from, name));
    await complete(await start('v2.bin', { format: 'torch', companions }));
    expect(readFileSync(join(folder, 'config.json'), 'utf8')).toBe('theirs');
    expect(readFileSync(join(folder, 'tokenizer.json'), 'utf8')).toBe('theirs');
    const checkpoint = await openCheckpoint(join(folder, 'v2.bin'));
    expect(checkpoint.companions.map((path) => path.slice(folder.length + 1))).toEqual([
      'v2.tokenizer.json',
      'merges.txt',
    ]);
    expect(checkpoint.configPath).toBe(join(folder, 'v2.config.json'));
    const second = start('v2.bin', { format: 'torch', config: { other: 1 } }, { overwrite: false });
    expect((await refusal(second)).message).toContain('output exists');
    rmSync(join(folder, 'v2.bin'));
    const third = start('v2.bin', { format: 'torch', config: { other: 1 } });
    expect((await refusal(third)).message).toContain('v2.config.json');
  });

  it('goes on after a crash at any point and ends with the same bytes', async () => {
    const options = [{ shardSize: 1599 }, { format: 'torch', shardSize: 1599 }] as const;
    for (const [n, more] of options.entries()) {
      await complete(await start(`whole-${n}`, more));
      const whole = filesOf(join(folder, `whole-${n}`));
      for (const stop of [0, 2, 4, plan.length]) {
        const first = await start(`part-${n}-${stop}`, more);
        for (let i = 0; i < stop; i++) {
          await put(first.writer, i);
          if (i === 2) await first.writer.flush();
        }
        await first.job.close(); // the process is gone: no close() of the writer, no finish()
        const second = await start(`part-${n}-${stop}`, more);
        const durable = plan.map(({ name }) => second.writer.has(name));
        expect(durable).toEqual(plan.map((_, i) => stop > 2 && i <= 2));
        await complete(
          second,
          plan.map((_, i) => i).filter((i) => i !== 1 || !durable[1]),
        ); // 0 is written again
        expect(filesOf(join(folder, `part-${n}-${stop}`))).toEqual(whole);
        await first.writer.close();
      }
    }
  });

  it('finishes after a crash between its last renames', async () => {
    const { job, writer } = await start('v2.bin', { format: 'torch' });
    for (const i of plan.keys()) await put(writer, i);
    await writer.flush();
    await job.close();
    await writer.close();
    // As if the config had been moved into place already.
    writeFileSync(join(folder, 'v2.config.json'), `${JSON.stringify(config, null, 2)}\n`);
    const again = await start('v2.bin', { format: 'torch' });
    await again.writer.finish();
    await again.job.remove();
    await requireContent(join(folder, 'v2.bin'));
  });

  it('replaces an existing output only as a whole and only when told to', async () => {
    await complete(await start('model'));
    expect((await refusal(start('model'))).message).toContain('exists already');
    const output = await start('model', { shardSize: 1599 }, { overwrite: true });
    await requireContent(join(folder, 'model'));
    await complete(output);
    expect(readdirSync(join(folder, 'model'))).toHaveLength(6);
    expect(readdirSync(folder)).toEqual(['model']);
  });

  it('refuses unplanned names, wrong sizes, missing tensors, another plan', async () => {
    const { job, writer } = await start('model');
    expect((await refusal(writer.write('nope', bytesSource(contentOf(0))))).kind).toBe('internal');
    const wrong = await refusal(writer.write('embed', bytesSource(contentOf(1))));
    expect(wrong.message).toContain('expected 1600 bytes, got 192 bytes');
    expect((await refusal(writer.finish())).message).toContain('6 planned tensors were never written: got embed');
    await writer.close();
    await job.close();
    expect((await refusal(start('model', { tensors: plan.slice(1) }))).message).toContain('--restart');
    expect(existsSync(join(folder, 'model'))).toBe(false);
  });

  it('refuses before any work what does not fit on the disk', async () => {
    const error = await refusal(start('model', { tensors: [{ name: 'w', shape: [2 ** 50], dtype: 'f32' }] }));
    expect([error.kind, error.exitCode]).toEqual(['resource', 4]);
    expect(existsSync(join(folder, 'model.part', 'output'))).toBe(false);
  });

  it('copies spans of other files through bounded buffers', async () => {
    const path = join(folder, 'source');
    const bytes = Buffer.alloc(9_000_001, 'abcdefg');
    writeFileSync(path, bytes);
    const tensors: PlannedTensor[] = [{ name: 'w', shape: [8_999_990], dtype: 'u8' }];
    const { job, writer } = await start('model', { tensors });
    await writer.write('w', fileSource({ path, offset: 7, bytes: 8_999_990 }));
    await writer.finish();
    await job.remove();
    const made = readFileSync(join(folder, 'model/model.safetensors'));
    expect(made.subarray(-8_999_990).equals(bytes.subarray(7, 8_999_997))).toBe(true);
    const short = fileSource({ path, offset: 8_000_000, bytes: 2_000_000 });
    const other = await start('other', { tensors: [{ name: 'w', shape: [2_000_000], dtype: 'u8' }] });
    const error = await refusal(other.writer.write('w', short));
    expect(error.kind).toBe('input');
    expect(error.message).toContain('byte 9000001');
    await other.writer.close();
    await other.job.close();
  });
});
