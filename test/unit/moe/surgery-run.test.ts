import { createHash } from 'node:crypto';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { openModel } from '../../../src/arch/open.js';
import { ResidentModel } from '../../../src/arch/resident.js';
import type { JobEnv } from '../../../src/backend/env.js';
import { readAt } from '../../../src/base/files.js';
import type { SurgeryOptions } from '../../../src/moe/surgery/options.js';
import { surgeryTotals } from '../../../src/moe/surgery/report.js';
import { previewSurgery, runSurgery } from '../../../src/moe/surgery/run.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { archCase, fixture, testEnv } from '../../arch/support.js';

vi.setConfig({ testTimeout: 120_000 });
const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));
const moe6m = fixture('moe-6m');

const job = (name: string, more: Partial<SurgeryOptions> = {}): SurgeryOptions => ({
  ...{ input: moe6m, out: join(folder, name), kind: 'prune', keep: 6 },
  calibration: { source: [fixture('samples.jsonl')], samples: 8, seqLen: 128, seed: 0 },
  tool: { name: 'deepseek-convert', version: '0' },
  commandLine: 'deepseek-convert moe',
  ...more,
});

/** A tiny model with a tokenizer of its 64 words, and text of them. */
const words = Array.from({ length: 64 }, (_, i) => `w${i}`);
function tiny(...given: Parameters<typeof archCase>): Pick<SurgeryOptions, 'input' | 'calibration'> {
  const input = archCase(...given);
  const vocab = Object.fromEntries(words.map((word, i) => [word, i]));
  const model = { type: 'WordLevel', vocab, unk_token: 'w0' };
  writeFileSync(join(input, 'tokenizer.json'), JSON.stringify({ version: '1.0', pre_tokenizer: { type: 'WhitespaceSplit' }, model, added_tokens: [] })); // prettier-ignore
  const text = Array.from({ length: 1100 }, (_, i) => words[(i * i * 7 + i * 13) % 61]).join(' ');
  writeFileSync(join(input, 'text.txt'), text);
  return { input, calibration: { source: [join(input, 'text.txt')], samples: 32, seqLen: 32, seed: 0 } };
}

/** Every tensor's type and bytes, by the names that the architecture uses. */
async function bytesOf(path: string): Promise<Map<string, string>> {
  const open = await openModel(path);
  const all = new Map<string, string>();
  for (const [name, { entry }] of open.tensors) {
    const file = await open.file(entry.span.path);
    const data = await readAt(file.fd, entry.span.offset, entry.span.bytes, entry.span.path);
    all.set(name, `${JSON.stringify(entry.encoding)} ${entry.shape.join('x')} ${createHash('sha256').update(data).digest('hex')}`); // prettier-ignore
  }
  await open.close();
  return all;
}

const configOf = (path: string) => JSON.parse(readFileSync(join(path, 'config.json'), 'utf8')) as Record<string, unknown>; // prettier-ignore

const both = ['prune', 'merge'] as const;

describe('as many experts as there are', () => {
  it.each(both)('%s changes no bit of any weight, nor the config', async (kind) => {
    const report = await runSurgery(job(`all-${kind}`, { kind, keep: 8 }), env);
    expect(await bytesOf(report.out)).toEqual(await bytesOf(moe6m));
    expect(configOf(report.out)).toEqual(configOf(moe6m));
    expect(surgeryTotals(report.layers).error).toBe(0);
  });
});

describe.each([
  ['qwen2_moe', 'num_experts', 3, both],
  ['qwen3_moe', 'num_local_experts', 4, ['prune']],
  ['mixtral', 'num_local_experts', 3, both],
  ['olmoe', 'num_experts', 2, ['prune']],
  ['deepseek', 'n_routed_experts', 4, ['prune']],
  ['deepseek_v2-group', 'n_routed_experts', 4, both],
  ['deepseek_v3-plain', 'n_routed_experts', 3, ['prune']],
  ['deepseek_v32', 'n_routed_experts', 4, ['prune']],
  ['glm4_moe', 'n_routed_experts', 4, both],
] as const)('%s', (name, key, keep, kinds) => {
  it.each(kinds)('%s: the output is what the report says', async (kind) => {
    const source = tiny(name, name === 'deepseek_v2-group' ? { config: (c) => Object.assign(c, { num_experts_per_tok: 2 }) } : {}); // prettier-ignore
    const report = await runSurgery(job(`${name}-${kind}`, { ...source, kind, keep }), env);
    expect(configOf(report.out)).toEqual({ ...configOf(source.input), [key]: keep });
    const [before, after] = [await bytesOf(source.input), await bytesOf(report.out)];
    const [fresh, old] = [await openModel(report.out), await openModel(source.input)];
    for (const [i, { moe, tensors }] of fresh.model.blocks.entries()) {
      if (!moe) {
        for (const { name: same } of tensors) expect(after.get(same)).toBe(before.get(same));
        continue;
      }
      const { members } = report.layers.find(({ block }) => block === i)!;
      expect(members).toHaveLength(keep);
      const all = members.flat();
      expect(new Set(all).size).toBe(all.length);
      expect(all.length).toBe(kind === 'prune' ? keep : report.plan.experts[0]);
      members.forEach(([first, ...others], n) => {
        for (const part of ['gate', 'up', 'down'] as const) {
          const from = before.get(`${old.model.blocks[i]!.moe!.expertLinears[first!]![part].name}.weight`);
          const to = after.get(`${moe.expertLinears[n]![part].name}.weight`);
          if (others.length === 0) expect(to).toBe(from);
          else expect(to).not.toBe(from);
        }
      });
    }
    await Promise.all([fresh.close(), old.close()]);
    expect(await logitsAreFinite(report.out)).toBe(true);
  });
}); // prettier-ignore

async function logitsAreFinite(path: string): Promise<boolean> {
  const open = await openModel(path);
  using model = await ResidentModel.load(open, env, 'f32');
  using scope = new Scope(env.device);
  const tokens = Int32Array.from({ length: 16 }, (_, i) => i * 3);
  const logits = await model.logits(scope, model.hidden(scope, tokens, 1)).float32();
  await open.close();
  return logits.every(Number.isFinite);
}

describe('groups, biases, and what else a model holds', () => {
  it('loses as many experts of each group, and keeps the rows of router and bias that go with them', async () => {
    const report = await runSurgery(job('groups', { by: 'reap', keep: 4 }), env);
    const [before, after] = [await openModel(moe6m), await openModel(report.out)];
    for (const { block, members } of report.layers) {
      const kept = members.map(([e]) => e!);
      expect(kept.filter((e) => e < 4)).toHaveLength(2);
      for (const name of ['gate.weight', 'gate.e_score_correction_bias'].map((part) => `model.layers.${block}.mlp.${part}`)) {
        const rowsOf = async (open: typeof before, count: number) => {
          const { span } = open.tensors.get(name)!.entry;
          const data = await readAt((await open.file(span.path)).fd, span.offset, span.bytes, name);
          return (row: number) => data.subarray((row * span.bytes) / count, ((row + 1) * span.bytes) / count).toString('hex');
        };
        const [old, fresh] = [await rowsOf(before, 8), await rowsOf(after, 4)];
        expect(kept.map((_, n) => fresh(n))).toEqual(kept.map((e) => old(e)));
      }
    }
    await Promise.all([before.close(), after.close()]);
  }); // prettier-ignore

  it('leaves everything that sees untouched (deepseek_ocr2)', async () => {
    const source = tiny('deepseek_ocr2');
    await expect(previewSurgery(job('ocr', { ...source, keep: 3 }))).rejects.toThrow('different numbers of experts');
    const config = (c: Record<string, unknown>) => Object.assign(c.text_config as object, { topk_group: 2, num_experts_per_tok: 1 }); // prettier-ignore
    const loose = tiny('deepseek_ocr2', { config });
    const { out } = await runSurgery(job('ocr', { ...loose, keep: 2 }), env);
    const [before, after] = [await bytesOf(loose.input), await bytesOf(out)];
    const seeing = [...before.keys()].filter(
      (name) => !/^(model\.layers|lm_head|model\.(embed_tokens|norm))/.test(name),
    );
    expect(seeing.length).toBeGreaterThan(5);
    for (const name of seeing) expect(after.get(name)).toBe(before.get(name));
    expect(configOf(out)).toMatchObject({ text_config: { n_routed_experts: 2 }, vision_config: configOf(loose.input).vision_config as object }); // prettier-ignore
  });

  it('leaves out layers that predict further, whose experts nothing is known of', async () => {
    const further = 'model.layers.2.';
    const source = tiny('deepseek_v3', {
      config: (c) =>
        Object.assign(c, { num_nextn_predict_layers: 1, num_experts_per_tok: 2, n_group: 2, topk_group: 1 }),
      tensors: (all) => {
        for (const [name, tensor] of [...all]) if (name.startsWith('model.layers.1.')) all.set(name.replace('model.layers.1.', further), tensor); // prettier-ignore
      },
    });
    const has = async (path: string) => [...(await bytesOf(path)).keys()].some((name) => name.startsWith(further));
    const [whole, six] = [await runSurgery(job('further-8', { ...source, keep: 8 }), env), await runSurgery(job('further-6', { ...source, keep: 6 }), env)]; // prettier-ignore
    expect(await bytesOf(whole.out)).toEqual(await bytesOf(source.input));
    expect([await has(whole.out), await has(six.out)]).toEqual([true, false]);
    expect(six.notices.join()).toContain('layers that predict further tokens are left out');
    expect(configOf(six.out)).toMatchObject({ n_routed_experts: 6, num_nextn_predict_layers: 0 });
  });
});

describe('the cost', () => {
  it('counts the bytes of weights that a token reads', async () => {
    const open = await openModel(moe6m);
    const perToken = (experts: number): number => {
      let bytes = 0;
      for (const [name, { entry }] of open.tensors) {
        if (entry.shape.length !== 2 || (name.includes('embed_tokens') && open.tensors.has('lm_head.weight'))) continue;
        const count = entry.shape[0]! * entry.shape[1]!;
        if (name.includes('.experts.'))
          bytes += (count * 2) / 8; // 2 of 8 experts a token, whatever is left of them
        else bytes += name.endsWith('mlp.gate.weight') ? (count * experts) / 8 : count;
      }
      return bytes * 2;
    };
    const { cost } = await previewSurgery(job('cost'));
    expect(cost.bytes).toEqual([perToken(8), perToken(6)]);
    await open.close();
  });
});

describe('quality and durability', () => {
  it('errs less than pruning at random, and the report says by how much', async () => {
    const calibration = { source: [fixture('samples.jsonl')], samples: 16, seqLen: 128, seed: 0 };
    const report = await runSurgery(job('six', { calibration }), env);
    const { error, random, reap, load } = surgeryTotals(report.layers);
    expect(error).toBeGreaterThan(0.05);
    expect(error).toBeLessThan(0.8 * random);
    expect(error).toBeLessThan(reap);
    expect(load.before.maxVio).toBeGreaterThan(0);
    expect(report.plan.cost.parameters[1]).toBeLessThan(0.92 * report.plan.cost.parameters[0]);
  });

  it('goes on after an interruption and ends with the same bytes', async () => {
    const source = tiny('deepseek', { config: (c) => Object.assign(c, { num_hidden_layers: 3 }) });
    const more = { ...source, kind: 'merge', keep: 5 } as const;
    await runSurgery(job('whole', more), env);
    const stop = new AbortController();
    const log = { ...env.log, progress: ({ done }: { done: number }) => done === 2 && stop.abort() };
    const interrupted: JobEnv = { ...env, log, signal: stop.signal };
    await expect(runSurgery(job('parts', more), interrupted)).rejects.toThrow('finished blocks are saved');
    expect(existsSync(join(folder, 'parts'))).toBe(false);
    await expect(runSurgery(job('parts', { ...more, keep: 4 }), env)).rejects.toThrow('recipe.keep: 5 -> 4');
    const report = await runSurgery(job('parts', more), env);
    expect(report.resumed).toBe(true);
    expect(report.layers).toHaveLength(2);
    expect(await bytesOf(join(folder, 'parts'))).toEqual(await bytesOf(join(folder, 'whole')));
  });
});

describe('refusals', () => {
  const refused = async (more: Partial<SurgeryOptions>) =>
    (await previewSurgery(job('refused', more)).then(() => undefined, (e: unknown) => e as Error))?.message ?? 'accepted'; // prettier-ignore

  it('names what does not fit', async () => {
    expect(await refused({ keep: 9 })).toContain('More experts to keep than there are');
    expect(await refused({ keep: 0 })).toContain('no number of experts');
    expect(await refused({ keep: 7 })).toMatch(/different numbers of experts[^]*multiple of the 2 groups/);
    // A group is scored by its two best: two groups need four.
    expect(await refused({ keep: 2 })).toMatch(/Fewer experts than a token takes[^]*4 to 8/);
    expect(await refused({ input: archCase('mixtral'), keep: 1 })).toMatch(/Fewer experts than a token takes[^]*2 to 4/);
    expect(await refused({ input: fixture('v1.0/v1.0_checkpoint.bin') })).toContain('The model has no experts');
    expect(await refused({ input: archCase('deepseek_v4') })).toContain('looked up by token');
  }); // prettier-ignore

  it('says how much calibration text it takes', async () => {
    const calibration = { source: [fixture('samples.jsonl')], samples: 3, seqLen: 128, seed: 0 };
    await expect(runSurgery(job('little', { calibration }), env)).rejects.toThrow(/at least 1024[^]*got 384 tokens|got 384 tokens[^]*at least 1024/); // prettier-ignore
    expect(existsSync(join(folder, 'little'))).toBe(false);
  });
});
