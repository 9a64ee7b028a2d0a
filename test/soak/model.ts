import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { f32, writeTensors, type StoredTensor } from '../cli/files.js';

/** A llama of one block and 60 thousand weights: what jobs leave behind does not depend on size. */
export function tinyModel(folder: string): string {
  mkdirSync(folder, { recursive: true });
  const [hidden, intermediate, vocab] = [64, 128, 64];
  const config = {
    ...{ architectures: ['LlamaForCausalLM'], model_type: 'llama', torch_dtype: 'float32', hidden_act: 'silu' },
    ...{ hidden_size: hidden, intermediate_size: intermediate, num_hidden_layers: 1, vocab_size: vocab },
    ...{ num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 64, rms_norm_eps: 1e-6 },
    ...{ rope_theta: 10000, tie_word_embeddings: false },
  };
  writeFileSync(join(folder, 'config.json'), JSON.stringify(config));
  const shapes: Record<string, readonly number[]> = {
    'model.embed_tokens.weight': [vocab, hidden],
    'model.layers.0.input_layernorm.weight': [hidden],
    'model.layers.0.self_attn.q_proj.weight': [hidden, hidden],
    'model.layers.0.self_attn.k_proj.weight': [hidden / 2, hidden],
    'model.layers.0.self_attn.v_proj.weight': [hidden / 2, hidden],
    'model.layers.0.self_attn.o_proj.weight': [hidden, hidden],
    'model.layers.0.post_attention_layernorm.weight': [hidden],
    'model.layers.0.mlp.gate_proj.weight': [intermediate, hidden],
    'model.layers.0.mlp.up_proj.weight': [intermediate, hidden],
    'model.layers.0.mlp.down_proj.weight': [hidden, intermediate],
    'model.norm.weight': [hidden],
    'lm_head.weight': [vocab, hidden],
  };
  const tensors = Object.entries(shapes).map(([name, shape]): [string, StoredTensor] => {
    const count = shape.reduce((a, b) => a * b, 1);
    const values = Array.from({ length: count }, (_, i) => (shape.length === 1 ? 1 : Math.sin(i + name.length) / 8));
    return [name, { dtype: 'F32', shape, data: f32(...values) }];
  });
  writeTensors(join(folder, 'model.safetensors'), new Map(tensors));
  return folder;
}
