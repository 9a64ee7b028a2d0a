import { writeFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { JobEnv } from '../backend/env.js';
import { makeFolder } from '../base/files.js';
import { addedToken, bpeModel, byteLevel, tokenizerJson } from '../base/tokenizer-json.js';
import { buildSafetensorsHeader } from '../formats/safetensors.js';
import { fill, random } from '../tensor/ops.js';
import { Scope } from '../tensor/tensor.js';

const sizes = { hidden: 128, heads: 4, kvHeads: 2, layers: 2, width: 512, vocab: 258, context: 256 };

/** Writes a Llama of random weights whose tokens are bytes: 0.6 million parameters, 1.1 MB, as a Hugging Face folder. */
export async function writeDemoModel(folder: string, { device }: Pick<JobEnv, 'device'>, seed: number): Promise<void> {
  const { hidden, heads, kvHeads, layers, width, vocab, context } = sizes;
  const keys = (hidden / heads) * kvHeads;
  const shapes = new Map<string, readonly number[]>([['model.embed_tokens.weight', [vocab, hidden]]]);
  for (let i = 0; i < layers; i++) {
    const parts = {
      input_layernorm: [hidden],
      'self_attn.q_proj': [hidden, hidden],
      'self_attn.k_proj': [keys, hidden],
      'self_attn.v_proj': [keys, hidden],
      'self_attn.o_proj': [hidden, hidden],
      post_attention_layernorm: [hidden],
      'mlp.gate_proj': [width, hidden],
      'mlp.up_proj': [width, hidden],
      'mlp.down_proj': [hidden, width],
    };
    for (const [part, shape] of Object.entries(parts)) shapes.set(`model.layers.${i}.${part}.weight`, shape);
  }
  shapes.set('model.norm.weight', [hidden]).set('lm_head.weight', [vocab, hidden]);

  const tensors = [...shapes].map(([name, shape]) => ({ name, shape, dtype: 'BF16' }));
  const { header, offsets, size } = buildSafetensorsHeader(tensors, { format: 'pt' });
  const file = Buffer.alloc(size);
  header.copy(file);
  using scope = new Scope(device);
  for (const [i, { name, shape }] of tensors.entries()) {
    const tensor = scope.empty('bf16', shape);
    if (shape.length === 1) fill(tensor, 1);
    else random(tensor, 'normal', seed + i, 0, deviation(name, shape[1] ?? 1));
    file.set(await tensor.bytesOut(), offsets.get(name));
  }
  await makeFolder(folder);
  await writeFile(join(folder, 'model.safetensors'), file);
  const config = {
    architectures: ['LlamaForCausalLM'],
    model_type: 'llama',
    hidden_size: hidden,
    intermediate_size: width,
    num_hidden_layers: layers,
    num_attention_heads: heads,
    num_key_value_heads: kvHeads,
    hidden_act: 'silu',
    rms_norm_eps: 1e-6,
    rope_theta: 10000,
    max_position_embeddings: context,
    vocab_size: vocab,
    tie_word_embeddings: false,
    bos_token_id: 256,
    eos_token_id: 257,
    dtype: 'bfloat16',
  };
  await writeFile(join(folder, 'config.json'), `${JSON.stringify(config, null, 2)}\n`);
  await writeFile(join(folder, 'tokenizer.json'), JSON.stringify(byteTokenizer()));
}

/** States keep their size through the layers: what is added to them is small, as GPT-2 begins (Radford et al. 2019). */
function deviation(name: string, inputs: number): number {
  if (name === 'model.embed_tokens.weight') return 1;
  return /\.(o_proj|down_proj)\./.test(name) ? (2 * sizes.layers * inputs) ** -0.5 : inputs ** -0.5;
}

/** A tokenizer.json whose tokens are the 256 bytes, spelled as GPT-2 spells bytes, and a token for either end. */
function byteTokenizer() {
  const printable = (byte: number) => (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  let others = 0;
  const vocab: Record<string, number> = {};
  for (let byte = 0; byte < 256; byte++) {
    vocab[String.fromCodePoint(printable(byte) ? byte : 256 + others++)] = byte;
  }
  const bytes = byteLevel(false);
  return tokenizerJson({
    added: [addedToken(256, '<s>'), addedToken(257, '</s>')],
    preTokenizer: bytes,
    decoder: bytes,
    model: bpeModel({ vocab: { ...vocab, '<s>': 256, '</s>': 257 }, merges: [] }),
  });
}
