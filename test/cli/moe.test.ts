import { existsSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it, vi } from 'vitest';
import { cli, fixture, v1, workFolder } from './support.js';

vi.setConfig({ testTimeout: 300_000 });
const folder = workFolder();
const out = (name: string): string => join(folder, name);
const quick = ['--samples', '8', '--seq-len', '128', '--rounds', '1', '--router-steps', '2', '--threads', '1', '-q', '--device', 'cpu', '--no-validate']; // prettier-ignore
const moe = fixture('moe-6m');
const json = (text: string) => JSON.parse(text) as Record<string, never>;

describe('the documents’ own form', () => {
  it('makes a .bin with its config beside it that equals the dense model with all experts on', async () => {
    const form = ['--input-model', v1, '--output-model', out('v2.0_converted.bin'), '--target-arch', 'moe', '--expert-num', '8']; // prettier-ignore
    const { code, stdout, stderr } = await cli([...form, ...quick, '--json']);
    expect(stderr).toBe('warning: 1024 calibration tokens are few for routers over 256 channels: 4096 (16 x the 256 channels) or more give better ones.\n'); // prettier-ignore
    expect(code).toBe(0);
    const data = json(stdout) as unknown as {
      shape: Record<string, number>;
      refit: boolean;
      exactness: { output: { relative: number } };
    };
    expect(data.shape).toMatchObject({ routed: 8, active: 2, shared: 1, width: 128, ffn: 1024 });
    expect(data.refit).toBe(false);
    expect(data.exactness.output.relative).toBeLessThan(5e-5);
    const config = json(readFileSync(out('v2.0_converted.config.json'), 'utf8'));
    expect(config).toMatchObject({
      model_type: 'glm4_moe',
      architectures: ['Glm4MoeForCausalLM'],
      n_routed_experts: 8,
      n_shared_experts: 1,
      num_experts_per_tok: 2,
      norm_topk_prob: false,
      routed_scaling_factor: 2,
      num_nextn_predict_layers: 0,
      partial_rotary_factor: 1,
      rope_parameters: { rope_type: 'default', rope_theta: 10000, partial_rotary_factor: 1 },
      head_dim: 64,
      tie_word_embeddings: false,
    });
    expect(readFileSync(out('v2.0_converted.bin')).subarray(0, 2).toString()).toBe('PK');
    expect(existsSync(out('v2.0_converted.bin.part'))).toBe(false);
    expect(existsSync(out('config.json'))).toBe(false);
  });

  it('refits when the number of active experts is asked for', async () => {
    const given = ['moe', v1, '-o', out('asked'), '--active', '4', ...quick, '--json'];
    const { code, stdout } = await cli(given);
    expect(code).toBe(0);
    expect(json(stdout)).toMatchObject({ refit: true, shape: { active: 4 } });
  });
});

it('--then quantize: one output, compared with the dense model', async () => {
  const given = ['moe', v1, '-o', out('then'), '--active', '7', '--then', 'quantize', '--group-size', '64'];
  const held = ['--validate-samples', '1', ...quick.filter((flag) => flag !== '--no-validate')];
  const { code, stdout, stderr } = await cli([...given, ...held, '--max-kl', '5', '--keep-failed', '--json']);
  expect([0, 3], stderr).toContain(code);
  const data = json(stdout) as unknown as {
    mixture: { shape: { active: number }; exactness: { split: { relative: number } } };
    totals: { quantized: number };
    validation: { kl: { mean: number } };
  };
  expect(data.mixture.shape.active).toBe(7);
  expect(data.mixture.exactness.split.relative).toBeLessThan(5e-5);
  expect(data.totals.quantized).toBeGreaterThan(4 * 3 * 8);
  expect(data.validation.kl.mean).toBeGreaterThan(0.001);
  const config = json(readFileSync(join(out('then'), 'config.json'), 'utf8'));
  expect(config).toMatchObject({ model_type: 'glm4_moe', quantization_config: { quant_method: 'compressed-tensors' } });
  expect(existsSync(out('then.mixture'))).toBe(false);
});

it('--groups and --balance: what the mixture is, and what its loads are', async () => {
  const given = [
    'moe',
    v1,
    '-o',
    out('groups'),
    '--active',
    '3',
    '--groups',
    '4',
    '--top-groups',
    '2',
    '--balance',
    '0.3',
  ];
  const { code, stdout, stderr } = await cli([...given, ...quick]);
  expect(code, stderr).toBe(0);
  expect(stdout).toContain('8 experts of 128, 3 active out of the best 2 of 4 groups, 1 shared');
  expect(stdout).toMatch(/Balanced to MaxVio 0.3 on calibration text \(before at most \d.\d\d\)\n/);
  const config = json(readFileSync(join(out('groups'), 'config.json'), 'utf8'));
  expect(config).toMatchObject({ n_group: 4, topk_group: 2, num_experts_per_tok: 3 });
});

describe('refusals', () => {
  it.each<[string, string[], number, string]>([
    ['more active than experts', [v1, '--active', '9'], 2, 'More active experts than there are'],
    ['a mixture', [moe], 1, 'is a mixture of experts already'],
    ['shared experts in mixtral', [v1, '--container', 'mixtral', '--shared', '1'], 2, 'cannot have 1 shared experts'],
    ['a width that does not divide', [v1, '--pad', 'none'], 2, 'does not divide by the number of experts'],
    ['groups without a number of the best', [v1, '--groups', '4'], 2, 'both of --groups and --top-groups'],
    ['groups that do not divide', [v1, '--groups', '3', '--top-groups', '2'], 2, '--groups that divides 8'],
    ['groups in qwen2_moe', [v1, '--container', 'qwen2_moe', '--groups', '4', '--top-groups', '2'], 2, 'cannot limit routing to groups'], // prettier-ignore
    ['balance in qwen2_moe', [v1, '--container', 'qwen2_moe', '--balance', '0.2'], 2, 'cannot balance loads'],
    ['balance of a mixture', [moe, '--prune-experts', '6', '--balance', '0.2'], 2, '--balance with --prune-experts'],
    ['groups of a mixture', [moe, '--merge-experts', '6', '--groups', '2', '--top-groups', '1'], 2, '--groups with --merge-experts'], // prettier-ignore
    ['an unknown container', [v1, '--container', 'mixtrall'], 2, 'Did you mean mixtral?'],
    ['bits without a quantization', [v1, '--bits', '8'], 2, 'those of --then quantize'],
    ['a file behind --then quantize', [v1, '-o', out('y.bin'), '--then', 'quantize'], 2, 'writes a folder'],
    [
      'a static mask without a place for it',
      [v1, '--split', 'static', '--container', 'mixtral'],
      2,
      'no selection bias',
    ],
    ['.gguf', [v1, '-o', out('x.gguf')], 2, 'cannot be written as .gguf'],
    [
      'a share of neurons without --method drop',
      [v1, '--drop-ratio', '0.5'],
      2,
      'Only --method drop draws neurons anew',
    ],
    ['no neurons drawn anew', [v1, '--method', 'drop', '--drop-ratio', '0'], 2, 'Plain copies are --method upcycle'],
    [
      'a rate without a distillation',
      [v1, '--active', '4', '--distill-lr', '0.01'],
      2,
      '--distill-lr without --distill-tokens',
    ],
    ['distilling with all experts on', [v1, '--active', '8', '--distill-tokens', '2K'], 2, 'here none is off'],
    [
      'distilling copies',
      [v1, '--method', 'upcycle', '--distill-tokens', '2K'],
      2,
      'Copies give the dense output already',
    ],
    [
      'a router that is none',
      [v1, '--active', '4', '--split', 'static', '--distill-tokens', '2K', '--distill-train', 'router'],
      2,
      'no router that could learn',
    ],
    [
      'a rank of whole weights',
      [v1, '--active', '4', '--distill-tokens', '2K', '--distill-rank', '4'],
      2,
      'A rank is that of low-rank additions',
    ],
    [
      'distilling a mixture',
      [moe, '--prune-experts', '4', '--distill-tokens', '2K'],
      2,
      '--distill-tokens with --prune-experts',
    ],
    ['no number of tokens', [v1, '--distill-tokens', 'many'], 2, '200000, 200K, 2M'],
    ['pruning and merging', [moe, '--prune-experts', '4', '--merge-experts', '4'], 2, 'not both'],
    [
      'pruning with options of a split',
      [moe, '--prune-experts', '4', '--active', '2'],
      2,
      '--active with --prune-experts',
    ],
    [
      'a measure without pruning',
      [moe, '--merge-experts', '4', '--prune-by', 'reap'],
      2,
      'how alike their outputs are',
    ],
    ['a measure alone', [v1, '--prune-by', 'reap'], 2, 'means nothing without --prune-experts'],
  ])('%s', async (_, given, exit, message) => {
    const { code, stderr, stdout } = await cli(['moe', '-o', out('refused'), ...quick, ...given]);
    expect(stderr).toContain(message);
    expect(code).toBe(exit);
    expect(stdout).toBe('');
    expect(existsSync(out('refused'))).toBe(false);
  });
});

describe('experts of a mixture', () => {
  it('pruned, compared with the mixture before the output has its name', async () => {
    const given = ['moe', moe, '-o', out('six'), '--prune-experts', '6', '--samples', '16', '--seq-len', '64'];
    const { code, stdout, stderr } = await cli([...given, '--calibration', fixture('samples.jsonl'), '--validate-samples', '1', '--json']); // prettier-ignore
    expect(code, stderr).toBe(0);
    const data = json(stdout) as unknown as {
      totals: { error: number; random: number; load: { after: { maxVio: number } } };
      validation: { passed: boolean; kl: { mean: number } };
    };
    expect(data).toMatchObject({
      method: 'prune',
      by: 'error',
      experts: { before: 8, after: 6, active: 2, groups: 2 },
    });
    expect(data.validation.kl.mean).toBeGreaterThan(0.01);
    expect(data.validation.passed).toBe(true);
    expect(data.totals.error).toBeGreaterThan(0);
    expect(json(readFileSync(join(out('six'), 'config.json'), 'utf8'))).toMatchObject({ n_routed_experts: 6 });
  });

  it.each([
    ['a dense model', v1, '4', 1, 'The model has no experts'],
    ['fewer experts than a token takes', moe, '2', 2, 'Fewer experts than a token takes'],
  ])('refuses %s', async (_, model, keep, exit, message) => {
    const { code, stderr } = await cli(['moe', model, '-o', out('none'), '--prune-experts', keep]);
    expect(stderr).toContain(message);
    expect(code).toBe(exit);
    expect(existsSync(out('none'))).toBe(false);
  });

  it('--dry-run shows what would be left', async () => {
    const { code, stdout } = await cli(['moe', moe, '-o', out('four'), '--merge-experts', '4', '--dry-run']);
    expect(code).toBe(0);
    expect(stdout).toContain('merge: 8 -> 4 experts a layer, 2 active, 4 -> 2 in each of 2 groups');
    expect(existsSync(out('four'))).toBe(false);
  });
});

it('--dry-run shows what would be made, and makes nothing', async () => {
  const given = ['--container', 'qwen2_moe', '--distill-tokens', '20K', '--distill-train', 'scales'];
  const { code, stdout } = await cli(['moe', v1, '-o', out('plan'), ...given, '--dry-run', '--json']);
  expect(code).toBe(0);
  const data = json(stdout) as unknown as { tensors: { name: string; from: string; shape: number[] }[] };
  expect(data).toMatchObject({ distillation: { tokens: 20_000, part: 'scales', lr: 0.01 } });
  const of = (name: string) => data.tensors.find((tensor) => tensor.name === name);
  expect(of('model.layers.3.mlp.experts.7.down_proj.weight')).toMatchObject({ from: 'made', shape: [256, 128] });
  expect(of('model.layers.3.self_attn.q_proj.bias')).toMatchObject({ from: 'constant', shape: [256] });
  expect(of('model.layers.3.self_attn.q_proj.weight')).toMatchObject({ from: 'copy' });
  expect(of('model.layers.3.mlp.gate_proj.weight')).toBeUndefined();
  expect(existsSync(out('plan'))).toBe(false);
});
