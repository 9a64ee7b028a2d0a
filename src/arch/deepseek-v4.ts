import { compressedAttention, type EntryIndexerSpec } from '../nn/compressed-attention.js';
import type { CompressorSpec } from '../nn/compressor.js';
import { hyperConnection, hyperHead, spread } from '../nn/hyper.js';
import { linearSpec, type Layer } from '../nn/layer.js';
import type { FfnSpec } from '../nn/mlp.js';
import { moeLayer } from '../nn/moe.js';
import type { RopeSpec } from '../nn/rope.js';
import { Config, limits } from './config.js';
import { decoder, type LayerParts, type Streams } from './decoder.js';
import { speller } from './deepseek-v4-names.js';
import { expertSpecs, ffnSpec, normSpec, readActivation, readExperts } from './parts.js';
import { readRope } from './rope-config.js';
import { readSizes, type Sizes } from './sizes.js';
import type { Model } from './types.js';

/**
 * DeepSeek-V4 (2026): attention on a window and on compressed entries before it, hyper-connections in place of plain
 * residuals, experts chosen by token in the first layers. Names are those of transformers' modules, spelled as the
 * checkpoint spells them.
 */
export function deepseekV4(c: Config): Model {
  for (const key of ['attention_bias', 'mlp_bias', 'tie_word_embeddings']) c.only(key, false);
  for (const key of ['num_key_value_heads', 'n_shared_experts', 'n_group', 'topk_group']) c.only(key, 1);
  c.only('first_k_dense_replace', 0);
  c.only('attn_logit_softcapping', null);
  // Drafting layers are carried through; how experts are stored, the tensors themselves say.
  c.understood('num_nextn_predict_layers', 'expert_dtype', 'intermediate_size');
  c.understood('dspark_block_size', 'dspark_markov_rank', 'dspark_noise_token_id', 'dspark_target_layer_ids');
  const sizes = { ...readSizes(c, { headDim: 512 }), kvHeads: 1 };
  const spell = speller(c.stores);
  const ropes = readRopes(c, sizes.headDim);
  const window = c.int('sliding_window', { default: 128 });
  const attention = attentionParts(c, sizes, { spell, window, ...ropes });
  const mlp = expertParts(c, sizes, spell);
  return decoder(c, sizes, ropes.main, (i, name) => ({ attention: attention(i, name), mlp: mlp(i, name), window }), {
    carried: ['mtp.', 'model.mtp.'],
    ragged: false,
    spell,
    streams: streamsOf(c, sizes, spell),
  });
}

type Spell = (name: string) => string;
interface Ropes {
  /** Of layers without entries, and of the others. */
  readonly main: RopeSpec;
  readonly compress: RopeSpec;
}

/** Two ropes, given as such (transformers 5) or as two bases and a scaling that holds for the second alone. */
function readRopes(c: Config, headDim: number): Ropes {
  const turned = c.optionalInt('qk_rope_head_dim', { max: headDim });
  const partial = c.optionalFloat('partial_rotary_factor', { max: 1 }) ?? (turned ?? headDim / 8) / headDim;
  const context = c.int('max_position_embeddings');
  const theta = c.float('rope_theta', { min: 1, max: 1e15, default: 10_000 });
  const compressTheta = c.float('compress_rope_theta', { min: 1, max: 1e15, default: 160_000 });
  const given = c.object('rope_scaling') ?? c.object('rope_parameters');
  c.understood('rope_parameters');
  const read = (values: Record<string, unknown>) => {
    const settings = { max_position_embeddings: context, partial_rotary_factor: partial, rope_parameters: values };
    return readRope(new Config(settings, c.where), { headDim, partial, interleaved: true, fromEnd: true }).rope;
  };
  const [main, compress] = [given?.object('main'), given?.object('compress')];
  if (given && main && compress) {
    given.understood('rope_type', 'rope_theta', 'partial_rotary_factor'); // left over, and not looked at
    given.finish();
    return { main: read({ rope_theta: theta, ...main.values }), compress: read({ rope_theta: compressTheta, ...compress.values }) }; // prettier-ignore
  }
  given?.only('rope_theta', theta);
  const scaling = { ...given?.values };
  const yarn = (scaling.rope_type ?? scaling.type) === 'yarn';
  // The amplitude that YaRN would give is not part of this model.
  const flat = { ...(yarn && { attention_factor: 1 }), ...scaling, rope_theta: compressTheta };
  return { main: read({ rope_type: 'default', rope_theta: theta }), compress: read(flat) };
}

const kinds = ['sliding_attention', 'compressed_sparse_attention', 'heavily_compressed_attention'] as const;
type Kind = (typeof kinds)[number];

/** What each layer's attention sees before its window: nothing, chosen entries, all entries. */
function readKinds(c: Config, layers: number): Kind[] {
  const types = c.words('layer_types', kinds, layers);
  // Drafting layers have entries of their own behind the others'.
  const ratios = c.has('compress_ratios') ? c.floats('compress_ratios') : undefined;
  if (types) return types;
  if (!ratios) return Array.from({ length: layers }, (_, i) => (i < 2 || i % 2 === 0 ? kinds[2] : kinds[1]));
  const known = new Map<number, Kind>([[0, kinds[0]], [4, kinds[1]], [128, kinds[2]]]); // prettier-ignore
  return Array.from({ length: layers }, (_, i) => {
    const kind = known.get(ratios[i] ?? Number.NaN);
    if (kind === undefined) throw c.wrong('compress_ratios', `${layers} or more of ${[...known.keys()].join(', ')}`);
    return kind;
  });
}

function readRates(c: Config): Record<Exclude<Kind, 'sliding_attention'>, number> {
  const given = c.object('compress_rates');
  const [sparse, heavy] = [given?.optionalInt(kinds[1]), given?.optionalInt(kinds[2])];
  given?.finish();
  return {
    [kinds[1]]: c.optionalInt('compress_rate_csa') ?? sparse ?? 4,
    [kinds[2]]: c.optionalInt('compress_rate_hca') ?? heavy ?? 128,
  };
}

function attentionParts(
  c: Config,
  { hidden, layers, heads, headDim, eps }: Sizes,
  { spell, window, main, compress }: Ropes & { spell: Spell; window: number },
): (i: number, layer: string) => Layer {
  const kind = readKinds(c, layers);
  const rates = readRates(c);
  const latent = c.int('q_lora_rank', { max: limits.hidden, default: 1024 });
  const groups = c.int('o_groups', { max: heads, default: 8 });
  const rank = c.int('o_lora_rank', { max: limits.hidden, default: 1024 });
  if (heads % groups !== 0) throw c.wrong('o_groups', `a divisor of num_attention_heads (${heads})`);
  const index = {
    heads: c.int('index_n_heads', { max: limits.heads, default: 64 }),
    width: c.int('index_head_dim', { min: compress.dim, max: limits.hidden, default: 128 }),
    topK: c.int('index_topk', { default: 512 }),
  };
  const compressor = (name: string, width: number, rate: number, overlap: boolean): CompressorSpec => {
    const outer = overlap ? 2 * width : width;
    return {
      values: linearSpec(spell(`${name}.kv_proj`), hidden, outer, 'other'),
      gates: linearSpec(spell(`${name}.gate_proj`), hidden, outer, 'other'),
      bias: spell(`${name}.position_bias`),
      norm: normSpec(spell(`${name}.kv_norm`), width, eps),
      rate,
      width,
      overlap,
      rope: compress,
    };
  };
  const indexer = (name: string, rate: number): EntryIndexerSpec => ({
    q: linearSpec(spell(`${name}.q_b_proj`), latent, index.heads * index.width, 'attention'),
    weights: linearSpec(spell(`${name}.scorer.weights_proj`), hidden, index.heads, 'router'),
    compressor: compressor(name, index.width, rate, true),
    ...index,
  });
  return (i, layer) => {
    const [name, own] = [`${layer}.self_attn`, kind[i]!];
    const of = (part: string, inner: number, outer: number, role: 'attention' | 'other' = 'attention') =>
      linearSpec(spell(`${name}.${part}`), inner, outer, role);
    const sparse = own === 'compressed_sparse_attention';
    return compressedAttention({
      layer: i,
      heads,
      headDim,
      qDown: of('q_a_proj', hidden, latent),
      qNorm: normSpec(spell(`${name}.q_a_norm`), latent, eps),
      qUp: of('q_b_proj', latent, heads * headDim),
      kv: of('kv_proj', hidden, headDim),
      kvNorm: normSpec(spell(`${name}.kv_norm`), headDim, eps),
      eps,
      sinks: spell(`${name}.sinks`),
      rope: own === 'sliding_attention' ? main : compress,
      window,
      ...(own !== 'sliding_attention' && { compressor: compressor(`${name}.compressor`, headDim, rates[own], sparse) }),
      ...(sparse && { indexer: indexer(`${name}.compressor.indexer`, rates[own]) }),
      groups,
      oDown: of('o_a_proj', (heads * headDim) / groups, groups * rank, 'other'),
      oUp: of('o_b_proj', groups * rank, hidden),
    });
  };
}

function expertParts(
  c: Config,
  { hidden, layers }: Sizes,
  spell: Spell,
): (i: number, layer: string) => LayerParts['mlp'] {
  // prettier-ignore
  const activation = readActivation(c);
  const vocab = c.int('vocab_size', { max: limits.vocab });
  const { experts, active } = readExperts(c, layers, 'n_routed_experts', 'num_local_experts');
  const width = c.int('moe_intermediate_size', { max: limits.width });
  const limit = c.float('swiglu_limit', { min: 1e-6, default: 10 });
  const types = c.words('mlp_layer_types', ['hash_moe', 'moe'], layers);
  const looked = c.int('num_hash_layers', { min: 0, default: 3 });
  c.only('topk_method', 'noaux_tc');
  c.only('norm_topk_prob', true);
  const route = {
    topK: active,
    scoring: c.choice('scoring_func', ['sqrtsoftplus', 'sigmoid'], 'sqrtsoftplus'),
    normalize: true,
    scale: c.float('routed_scaling_factor', { default: 1.5 }),
  };
  const spelled = ({ gate, up, down }: FfnSpec): FfnSpec => {
    const as = <T extends { name: string }>(linear: T): T => ({ ...linear, name: spell(linear.name) });
    return { gate: as(gate), up: as(up), down: as(down), activation, limit };
  };
  return (i, layer) => {
    const name = `${layer}.mlp`;
    const byToken = types ? types[i] === 'hash_moe' : i < looked;
    return moeLayer({
      layer: i,
      router: linearSpec(spell(`${name}.gate`), hidden, experts, 'router'),
      ...(byToken
        ? { byToken: { name: spell(`${name}.gate.tid2eid`), vocab } }
        : { routeBias: spell(`${name}.gate.e_score_correction_bias`) }),
      route,
      experts: expertSpecs(`${name}.experts`, experts, { hidden, width }, activation).map(spelled),
      sharedCount: 1,
      shared: spelled(ffnSpec(`${name}.shared_experts`, { hidden, width }, activation, 'shared-expert')),
    });
  };
}

function streamsOf(c: Config, { hidden, eps: normEps }: Sizes, spell: Spell): Streams {
  const streams = c.int('hc_mult', { max: 64, default: 4 });
  const eps = c.float('hc_eps', { max: 1, default: 1e-6 });
  const iterations = c.int('hc_sinkhorn_iters', { max: 1000, default: 20 });
  const of = (name: string) => ({
    fn: spell(`${name}fn`),
    base: spell(`${name}base`),
    scale: spell(`${name}scale`),
    streams,
    hidden,
    normEps,
    eps,
  });
  return {
    count: streams,
    spread: (scope, x) => spread(scope, x, streams),
    residual: (layer, part) => hyperConnection({ ...of(`${layer}.${part}_hc.`), iterations }),
    head: hyperHead(of('model.hc_head.hc_')),
  };
}
