import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { archCase } from '../arch/support.js';
import { cli, fixture, json, v1, workFolder } from './support.js';

const folder = workFolder();
const moe = fixture('moe-6m');
const look = async (...args: string[]) => (await cli(['inspect', ...args, '-q'])).stdout;

describe('inspect --tree', () => {
  it('folds alike layers and experts, and its sizes add up', async () => {
    const text = await look(moe, '--tree');
    expect(text).toMatch(/^model +8\.48 MB +73%$/m);
    expect(text).toMatch(/^│ {2}└─ 1-3 {2}x 3 +4\.55 MB +39%$/m);
    expect(text).toMatch(/experts\.0-7 {2}x 8 +3\.54 MB/);
    expect(text).toMatch(/^.*q_a_proj\.weight +bf16 \[96, 192\] +111 kB/m);
    // Each tensor of one layer stands there once.
    expect(text.match(/experts\.0-7/g)).toHaveLength(1);
    interface Branch {
      bytes: number;
      tensors: number;
      branches: Branch[];
    }
    const { tree } = json<{ tree: Branch[] }>(await cli(['inspect', moe, '--tree', '--json']));
    const adds = (branch: Branch): void => {
      if (branch.branches.length === 0) return;
      expect(branch.branches.reduce((n, { bytes }) => n + bytes, 0)).toBeLessThanOrEqual(branch.bytes);
      branch.branches.forEach(adds);
    };
    tree.forEach(adds);
    expect(tree.reduce((n, { tensors }) => n + tensors, 0)).toBe(129);
  });
  it('does not fold what differs', async () => {
    const odd = archCase('llama', {
      tensors: (tensors) => {
        const name = 'model.layers.1.mlp.down_proj.weight';
        const { shape } = tensors.get(name)!;
        tensors.set(name, { dtype: 'F32', shape, data: new Uint8Array(4 * shape[0]! * shape[1]!) });
      },
    });
    expect(await look(archCase('llama'), '--tree')).toContain('layers.0-1  x 2');
    const text = await look(odd, '--tree');
    expect(text).not.toContain('0-1');
    expect(text).toMatch(/^f32 +1 +/m);
  });
});

describe('inspect --diagram', () => {
  it('shows each kind of layer once, with its parameters', async () => {
    const text = await look(moe, '--diagram');
    expect(text).toMatch(/embedding +8,192 x 192 +1\.57 M/);
    expect(text).toMatch(/── layer 0 ─/);
    expect(text).toMatch(/── 3 x {2}layers 1-3 ─/);
    expect(text).toMatch(/attention +4 heads, latent 64 \+ 16, queries by 96 +93\.3 K/);
    expect(text).toMatch(/experts +8 of width 128, 2 active, 1 shared +665 K/);
    const boxes = text.split('\n').filter((line) => /^[┌│└]/.test(line));
    expect(new Set(boxes.map((line) => line.length)).size).toBe(1);
  });
  it.each(['llama', 'mistral', 'mixtral', 'deepseek_v4', 'deepseek_vl'])('draws %s', async (name) => {
    expect(await look(archCase(name), '--diagram')).toMatch(/tokens[^]*attention[^]*logits/);
  });
});

describe('inspect --stats', () => {
  it('shows a channel that stands out, and values that are not finite', async () => {
    const loud = 'model.layers.1.self_attn.o_proj.weight';
    const path = archCase('llama', {
      tensors: (tensors) => {
        const halves = new Uint16Array(tensors.get(loud)!.data.buffer);
        for (let row = 0; row < 32; row++) halves[32 * row + 5] = 0x4100; // 8
        new Uint16Array(tensors.get('model.norm.weight')!.data.buffer)[3] = 0x7fc0; // not a number
      },
    });
    const text = await look(path, '--stats', '--device', 'cpu');
    expect(text).toMatch(/Outlier channels .*: 1$/m);
    expect(text).toMatch(/self_attn\.o_proj\.weight +input 5 +8 +\d+\.\d+ x$/m);
    expect(text).toMatch(/not finite\n *model\.norm\.weight +1 of 32$/m);
    const { statistics } = json<{ statistics: { outlierChannels: object[]; tensors: { zeros: number }[] } }>(
      await cli(['inspect', path, '--stats', '--json', '--device', 'cpu']),
    );
    expect(statistics.outlierChannels).toEqual([
      expect.objectContaining({ name: loud, of: 'input', index: 5, absmax: 8 }),
    ]);
    expect(statistics.tensors).toHaveLength(21);
  });
  it('is interrupted by Ctrl-C and says the command', async () => {
    const { code, stderr } = await cli(['inspect', v1, '--stats', '--device', 'cpu', '--progress', 'plain', '-v'], {
      started: (child) => child.stderr!.once('data', () => child.kill('SIGINT')),
    });
    // So small a model may be done first.
    if (code !== 0)
      expect([code, stderr]).toEqual([75, expect.stringContaining(`To go on: deepseek-convert inspect ${v1}`)]);
  });
});

describe('inspect --html', () => {
  it('writes one page that asks for nothing from anywhere', async () => {
    const page = join(folder, 'model.html');
    await look(moe, '--html', page, '--stats', '--device', 'cpu');
    const html = readFileSync(page, 'utf8');
    expect(html).toContain("default-src 'none'");
    expect(html).not.toMatch(/(src|href)="?(https?:)?\/\//);
    for (const part of ['8,192 x 192', 'experts.0-7', 'layers 1-3', 'mlp.experts.*.down_proj', '5,811,032']) {
      expect(html).toContain(part);
    }
  });
  it('escapes names', async () => {
    const page = join(folder, 'odd.html');
    const path = archCase('llama', {
      config: (config) => (config.model_type = 'no<b>such'),
      tensors: (tensors) => tensors.set('<script>x', { dtype: 'F32', shape: [1], data: new Uint8Array(4) }),
    });
    await look(path, '--html', page);
    const html = readFileSync(page, 'utf8');
    expect(html).toContain('&lt;script&gt;x');
    expect(html).not.toContain('<script>x');
    expect(html).not.toContain('no<b>such');
  });
});
