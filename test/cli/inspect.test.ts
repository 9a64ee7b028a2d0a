import { cpSync, existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { archCase } from '../arch/support.js';
import { cli, fixture, json, v1, workFolder } from './support.js';

const folder = workFolder();

interface Inspected {
  supported: boolean;
  parameters: { total: number; active: number };
  experts: { routed: number; active: number; shared: number; layers: number[] } | null;
  memory: { bf16: number; int4: number; kvCache: number; kvCachePerToken: number };
  context: number;
  would: {
    quantize: {
      linears: number;
      left: { reason: string; linears: number }[];
      bitsPerWeight: number;
      bytes: { from: number; to: number };
    };
    moe: { shape: string; bytes: { from: number; to: number } } | { refused: string };
  } | null;
  stored: { type: string; tensors: number; values: number; bytes: number }[];
  notes: string[];
  carried: string[];
  tensors?: { name: string; type: string; shape: number[] }[];
}
const inspected = async (...args: string[]) => json<Inspected>(await cli(['inspect', ...args, '--json']));

/** The config and weights of fixtures/v1.0 with a change to the config. */
function altered(name: string, change: (config: Record<string, unknown>) => void): string {
  const made = join(folder, name);
  mkdirSync(made);
  cpSync(v1, join(made, 'pytorch_model.bin'));
  const config = JSON.parse(readFileSync(fixture('v1.0/v1.0_checkpoint.config.json'), 'utf8')) as Record<string, unknown>; // prettier-ignore
  change(config);
  writeFileSync(join(made, 'config.json'), JSON.stringify(config));
  return made;
}

describe('inspect', () => {
  it('knows the dense model', async () => {
    const { parameters, memory, experts, stored, notes } = await inspected(v1);
    // 8192 x 256 embedding (tied), 4 layers of q 256x256, k, v 128x256, o 256x256, 3 x 1024x256, 2 norms, 1 norm
    const total = 8192 * 256 + 4 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 1024 * 256 + 2 * 256) + 256;
    expect(parameters).toEqual({ total, active: total });
    expect(memory.bf16).toBe(2 * total);
    expect(memory.kvCachePerToken).toBe(4 * 2 * 2 * 64 * 2);
    expect(memory.kvCache).toBe(512 * memory.kvCachePerToken);
    expect(experts).toBeNull();
    expect(stored).toEqual([{ type: 'bf16', tensors: 38, values: total, bytes: 2 * total }]);
    expect(notes).toEqual([]);
  });
  it('knows the MoE, and what a token touches of it', async () => {
    const { parameters, experts, supported, stored } = await inspected(fixture('moe-6m'));
    expect(supported).toBe(true);
    const stated = JSON.parse(readFileSync(fixture('moe-6m/training.json'), 'utf8')) as { params: number };
    // PyTorch counts the selection biases of three routers as buffers.
    expect(parameters.total).toBe(stated.params + 3 * 8);
    expect(stored.reduce((n, s) => n + s.values, 0)).toBe(parameters.total);
    expect(experts).toMatchObject({ routed: 8, active: 2, shared: 1 });
    const config = JSON.parse(readFileSync(fixture('moe-6m/config.json'), 'utf8')) as Record<string, number>;
    const expert = 3 * config.hidden_size! * config.moe_intermediate_size!;
    expect(parameters.total - parameters.active).toBe(experts!.layers.length * 6 * expert);
  });
  it('says what quantize and moe would do', async () => {
    const { would } = await inspected(v1);
    expect(would!.quantize).toMatchObject({ linears: 28, left: [{ reason: 'the head stays in high precision', linears: 1 }] }); // prettier-ignore
    // 4 bits, and a bf16 scale each 128 weights.
    expect(would!.quantize.bitsPerWeight).toBe(4 + 16 / 128);
    expect(would!.quantize.bytes.to).toBeLessThan(would!.quantize.bytes.from * 0.6);
    expect(JSON.stringify(would!.moe)).toContain('8 experts of 128, 2 active, 1 shared');
    const moe = await inspected(fixture('moe-6m'));
    expect(JSON.stringify(moe.would!.moe)).toMatch(/refused.*a mixture of experts already/);
    const { stdout } = await cli(['inspect', v1]);
    expect(stdout).toMatch(/quantize would +28 linears to 4\.13 bits, 1 left in high precision, 12\.1 MB -> 6\.\d+ MB/);
    expect(stdout).toMatch(/moe would +8 experts of 128/);
  });
  it('counts what is cached: latents, windows, compressed entries', async () => {
    // Latent attention keeps rank + turned channels a token and layer, here 128 + 32.
    const { memory } = await inspected(fixture('moe-6m'));
    const config = JSON.parse(readFileSync(fixture('moe-6m/config.json'), 'utf8')) as Record<string, number>;
    const each = config.kv_lora_rank! + config.qk_rope_head_dim!;
    expect(memory.kvCachePerToken).toBe(2 * config.num_hidden_layers! * each);
    const mistral = await inspected(archCase('mistral'));
    // Two layers of two heads of 8, keys and values, of the last 8 of 64 tokens.
    expect(mistral.memory.kvCache).toBe(2 * (2 * 2 * 2 * 8) * 8);
    const v4 = await inspected(archCase('deepseek_v4'));
    expect(v4.notes).toEqual([]);
    // Windows of 8 in four layers; entries of 16 each 4, 8 and 4 tokens; keys of 8 beside those of each 4.
    expect(v4.memory.kvCache).toBe(2 * (4 * 16 * 8 + 2 * 16 * 16 + 16 * 8 + 2 * 8 * 16));
    expect(v4.would!.quantize.left).toContainEqual({ reason: 'engines compute it in high precision', linears: 14 });
  });
  it('lists what is carried through: vision towers, drafting layers', async () => {
    const path = archCase('deepseek_vl');
    const { carried, notes } = await inspected(path);
    expect(notes).toEqual([]);
    expect(carried.length).toBeGreaterThan(0);
    expect(carried.every((name) => /^model\.(vision_model|aligner)\./.test(name))).toBe(true);
    const { stdout } = await cli(['inspect', path]);
    expect(stdout).toMatch(/Carried through +\d+ tensors: model\.(vision_model|aligner) \(\d+\), model\./);
    const drafting = archCase('deepseek_v4', {
      tensors: (t) => t.set('mtp.0.norm.weight', { dtype: 'BF16', shape: [1], data: new Uint8Array(2) }),
    });
    expect((await inspected(drafting)).carried).toEqual(['mtp.0.norm.weight']);
  });
  it('lists tensors', async () => {
    const { tensors } = await inspected(v1, '--tensors');
    expect(tensors).toHaveLength(38);
    expect(tensors!.find(({ name }) => name.endsWith('layers.3.mlp.down_proj.weight'))).toMatchObject({
      type: 'bf16',
      shape: [256, 1024],
    });
    const { stdout } = await cli(['inspect', v1, '--tensors']);
    expect(stdout).toMatch(/model\.layers\.3\.mlp\.down_proj\.weight +bf16 +\[256, 1024\] +524 kB/);
  });
  it('shows tensors of architectures that it does not know', async () => {
    const strange = altered('strange', (config) => (config.model_type = 'retnet'));
    const { supported, stored, notes } = await inspected(strange);
    expect(supported).toBe(false);
    expect(stored[0]!.tensors).toBe(38);
    expect(notes.join()).toContain('retnet');
  });
  it('shows a file without a config', async () => {
    const bare = join(folder, 'bare');
    mkdirSync(bare);
    cpSync(v1, join(bare, 'w.bin'));
    const { notes, stored } = await inspected(join(bare, 'w.bin'));
    expect(stored[0]!.tensors).toBe(38);
    expect(notes.join()).toContain('No config.json');
    const config = fixture('v1.0/v1.0_checkpoint.config.json');
    expect((await inspected(join(bare, 'w.bin'), '--config', config)).supported).toBe(true);
  });
  it('says where config and weights disagree', async () => {
    const other = altered('other', (config) => {
      config.num_hidden_layers = 5;
      config.intermediate_size = 768;
    });
    const { notes } = await inspected(other);
    expect(notes.join('\n')).toMatch(/expects tensors that are not there: model\.layers\.4/);
    expect(notes.join('\n')).toMatch(/mlp\.gate_proj\.weight \[1024, 256\], expected \[768, 256\]/);
  });
});

describe('inspect --security', () => {
  it('finds nothing in tensors', async () => {
    const { code, stdout } = await cli(['inspect', v1, '--security']);
    expect(code).toBe(0);
    expect(stdout).toContain('could run code');
  });
  it('finds a pickle that calls os.system, exits with 1 and does not run it', async () => {
    const proof = join(folder, 'ran');
    const command = `touch ${proof}`;
    const pickle = Buffer.concat([
      Buffer.from('\x80\x02cposix\nsystem\nX', 'latin1'),
      Buffer.from(Uint32Array.of(command.length).buffer),
      Buffer.from(`${command}\x85R.`, 'latin1'),
    ]);
    const path = join(folder, 'evil.bin');
    writeFileSync(path, storedZip([['evil/data.pkl', pickle], ['evil/version', Buffer.from('3\n')]])); // prettier-ignore
    const { code, stdout } = await cli(['inspect', path, '--security']);
    expect(code).toBe(1);
    expect(stdout).toContain('posix.system');
    expect((await cli(['inspect', path])).code).toBe(1);
    expect(existsSync(proof)).toBe(false);
  });
  it('tells of Python files and auto_map', async () => {
    const remote = altered('remote', (config) => (config.auto_map = { AutoModel: 'modeling_x.X' }));
    writeFileSync(join(remote, 'modeling_x.py'), 'print()');
    const { code, stdout } = await cli(['inspect', remote, '--security']);
    expect(code).toBe(0);
    expect(stdout).toMatch(/caution +modeling_x\.py/);
    expect(stdout).toContain('auto_map');
  });
});

/** A zip archive of stored members (PKWARE APPNOTE 4.3). */
function storedZip(members: readonly (readonly [name: string, data: Buffer])[]): Buffer {
  const parts: Buffer[] = [];
  const directory: Buffer[] = [];
  let at = 0;
  for (const [name, data] of members) {
    const facts = Buffer.alloc(26);
    facts.writeUInt16LE(20, 0);
    facts.writeUInt32LE(crc32(data), 10);
    facts.writeUInt32LE(data.length, 14);
    facts.writeUInt32LE(data.length, 18);
    facts.writeUInt16LE(name.length, 22);
    const local = Buffer.concat([Buffer.from('PK\x03\x04'), facts, Buffer.from(name), data]);
    const tail = Buffer.alloc(14);
    tail.writeUInt32LE(at, 10);
    directory.push(Buffer.concat([Buffer.from('PK\x01\x02\x14\x00', 'latin1'), facts, tail, Buffer.from(name)]));
    parts.push(local);
    at += local.length;
  }
  const central = Buffer.concat(directory);
  const end = Buffer.alloc(22);
  end.write('PK\x05\x06', 'latin1');
  end.writeUInt16LE(members.length, 8);
  end.writeUInt16LE(members.length, 10);
  end.writeUInt32LE(central.length, 12);
  end.writeUInt32LE(at, 16);
  return Buffer.concat([...parts, central, end]);
}

function crc32(data: Buffer): number {
  let crc = ~0;
  for (const byte of data) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
