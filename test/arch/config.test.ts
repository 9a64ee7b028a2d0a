import { readFileSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { Config } from '../../src/arch/config.js';
import { readRope } from '../../src/arch/rope-config.js';
import { buildModel, modelTypes } from '../../src/arch/registry.js';
import { inverseFrequencies, ropeAmplitude, ropeTable } from '../../src/nn/rope.js';
import { badInputMessage } from '../support/refusal.js';
import { fixture } from './support.js';

type Json = Record<string, unknown>;
const base = (name: string): Json => JSON.parse(readFileSync(fixture('arch', name, 'config.json'), 'utf8')) as Json;
const build = (name: string, changes: Json) => buildModel({ ...base(name), ...changes }, 'config.json');
const refused = (name: string, changes: Json) => badInputMessage(() => build(name, changes));

describe('what is not understood, or makes no sense, is refused with its key', () => {
  test.each<[string, string, Json, RegExp]>([
    ['an unknown key', 'llama', { attention_sink_size: 4 }, /attention_sink_size is not understood.*got 4/s],
    ['an unknown switch', 'qwen3', { use_hyper_norm: true }, /use_hyper_norm/],
    ['a key of another architecture', 'llama', { sliding_window: 8 }, /sliding_window/],
    ['a soft cap on latents', 'deepseek_v3', { attn_logit_softcapping: 50 }, /attn_logit_softcapping/],
    ['a soft cap of zero', 'mistral', { final_logit_softcapping: 0 }, /final_logit_softcapping/],
    ['a size that is text', 'llama', { hidden_size: '32' }, /hidden_size.*got "32".*|integer/s],
    ['a fraction', 'llama', { num_hidden_layers: 2.5 }, /num_hidden_layers/],
    ['zero heads', 'llama', { num_attention_heads: 0 }, /num_attention_heads/],
    ['an absurd size', 'llama', { num_hidden_layers: 1e9 }, /num_hidden_layers.*1 to 2048/s],
    ['absurdly many experts', 'mixtral', { num_local_experts: 2 ** 30 }, /num_local_experts/],
    ['a missing size', 'llama', { hidden_size: null }, /hidden_size is missing/],
    ['heads that do not divide', 'llama', { num_key_value_heads: 3 }, /num_key_value_heads.*divisor/s],
    ['more active experts than there are', 'mixtral', { num_experts_per_tok: 9 }, /num_experts_per_tok.*1 to 4/s],
    ['an unknown activation', 'llama', { hidden_act: 'relu' }, /hidden_act.*silu/s],
    ['a flag that is a number', 'llama', { attention_bias: 1 }, /attention_bias.*true or false/s],
    ['an unknown rope', 'llama', { rope_parameters: { rope_type: 'spiral' } }, /rope_type.*"spiral"/s],
    [
      'an unknown rope key',
      'llama',
      { rope_parameters: { rope_type: 'default', twist: 2 } },
      /rope_parameters.*twist|twist.*rope_parameters/s,
    ],
    ['a rope without its factor', 'llama', { rope_parameters: { rope_type: 'linear' } }, /factor is missing/],
    [
      'longrope of the wrong width',
      'llama',
      { rope_parameters: { rope_type: 'longrope', short_factor: [1], long_factor: [1], factor: 2 } },
      /short_factor.*list of 4/s,
    ],
    ['partly turned heads where whole ones turn', 'llama', { partial_rotary_factor: 0.5 }, /partial_rotary_factor/],
    ['another scoring', 'deepseek_v3', { scoring_func: 'softmax' }, /scoring_func.*not usable.*not supported/s],
    ['groups that do not divide', 'deepseek_v3', { n_group: 3 }, /n_group.*divisor/s],
    ['sparse layers only now and then', 'deepseek_v2', { moe_layer_freq: 2 }, /moe_layer_freq/],
    ['layer types of the wrong length', 'qwen2', { layer_types: ['full_attention'] }, /layer_types.*list of 2/s],
    ['two names that disagree', 'qwen3_moe', { num_local_experts: 6, num_experts: 7 }, /num_local_experts|num_experts/],
  ])('%s', async (_, name, changes, message) => {
    expect(await refused(name, changes)).toMatch(message);
  });
  test('an empty config', async () => {
    expect(await badInputMessage(() => buildModel({}, 'config.json'))).toMatch(/model_type/);
  });
});

describe('what changes nothing is accepted', () => {
  test.each<[string, Json]>([
    [
      'settings of generation and training',
      { temperature: 0.7, attention_dropout: 0.1, initializer_range: 1, _name_or_path: 'x' },
    ],
    ['unknown keys that are off', { use_magic: false, magic: null, more_magic: {}, lists: [] }],
    ['rope parameters of transformers 4', { rope_parameters: undefined, rope_theta: 5e5, rope_scaling: null }],
    ['a repeated whole factor', { partial_rotary_factor: 1 }],
  ])('%s', (_, changes) => {
    expect(build('llama', changes).modelType).toBe('llama');
  });
});

describe('rope parameters of transformers 4 mean the same as those of 5', () => {
  const read = (json: Json) =>
    readRope(new Config({ max_position_embeddings: 64, ...json }, 'config.json'), { headDim: 8 });
  const longrope = {
    short_factor: [1, 1, 1, 1],
    long_factor: [1, 2, 3, 4],
    factor: 4,
    original_max_position_embeddings: 16,
  };
  const yarn = { factor: 4, beta_fast: 16, mscale: 1, mscale_all_dim: 0.7, original_max_position_embeddings: 16 };
  const llama3 = { factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_position_embeddings: 16 };
  test.each<[string, Json]>([
    ['linear', { factor: 2 }],
    ['dynamic', { factor: 2 }],
    ['llama3', llama3],
    ['yarn', yarn],
    ['longrope', longrope],
  ])('%s', (rope_type, settings) => {
    const five = read({ rope_parameters: { rope_type, rope_theta: 500, ...settings } });
    expect(five.rope).toMatchObject({ theta: 500, dim: 8, scaling: { type: rope_type } });
    expect(read({ rope_theta: 500, rope_scaling: { rope_type, ...settings } })).toEqual(five);
    expect(read({ rope_theta: 500, rope_scaling: { type: rope_type, ...settings } })).toEqual(five);
  });
  test('without a word: theta 10,000, nothing stretched', () => {
    expect(read({}).rope).toEqual({
      dim: 8,
      theta: 10_000,
      interleaved: false,
      fromEnd: false,
      scaling: { type: 'default' },
    });
  });
});

describe('rope frequencies of real models are those of transformers', () => {
  interface Case {
    dim: number;
    context: number;
    parameters: Json;
    length: number;
    amplitude: number;
    inverse: number[];
  }
  const cases = JSON.parse(readFileSync(fixture('arch', 'rope.json'), 'utf8')) as Case[];
  test.each(cases.map((c) => [`${String(c.parameters.rope_type)}, ${c.dim} channels, ${c.length} tokens`, c] as const))(
    '%s',
    (_, { dim, context, parameters, length, amplitude, inverse }) => {
      const json = { max_position_embeddings: context, rope_parameters: parameters };
      const { rope } = readRope(new Config(json, 'config.json'), { headDim: dim });
      const got = inverseFrequencies(rope, length);
      expect(got).toHaveLength(inverse.length);
      inverse.forEach((f, i) => expect(Math.abs(got[i]! / f - 1), `channel ${i}`).toBeLessThan(1e-6));
      expect(ropeAmplitude(rope)).toBeCloseTo(amplitude, 12);
      const { cos, sin } = ropeTable(rope, 64);
      const angle = Math.fround(inverseFrequencies(rope, 64)[1]! * 50);
      expect(cos[50 * (dim / 2) + 1]).toBeCloseTo(Math.cos(angle) * amplitude, 6);
      expect(sin[50 * (dim / 2) + 1]).toBeCloseTo(Math.sin(angle) * amplitude, 6);
    },
  );
});

test('every supported model_type has a case that is compared with another implementation', () => {
  for (const type of modelTypes) expect(base(type).model_type).toBe(type);
});
