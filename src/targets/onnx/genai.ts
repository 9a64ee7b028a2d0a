import type { Model } from '../../arch/types.js';
import type { CacheShape } from './attention.js';

/** Names that onnxruntime-genai has for plain decoders; for all others `decoder` means the same code path. */
const knownTypes: ReadonlySet<string> = new Set(['llama', 'mistral', 'qwen2', 'qwen3']);

/** genai_config.json: how onnxruntime-genai feeds the model. */
export function genaiConfig(model: Model, cache: CacheShape, padId: number | undefined): object {
  const [eos = 0] = model.eosIds;
  return {
    model: {
      bos_token_id: model.bosId ?? eos,
      context_length: model.context,
      decoder: {
        session_options: { log_id: 'onnxruntime-genai', provider_options: [] },
        filename: 'model.onnx',
        head_size: cache.width,
        hidden_size: model.hidden,
        inputs: {
          input_ids: 'input_ids',
          attention_mask: 'attention_mask',
          past_key_names: 'past_key_values.%d.key',
          past_value_names: 'past_key_values.%d.value',
        },
        outputs: { logits: 'logits', present_key_names: 'present.%d.key', present_value_names: 'present.%d.value' },
        num_attention_heads: model.heads,
        num_hidden_layers: model.blocks.length,
        num_key_value_heads: cache.heads,
      },
      eos_token_id: model.eosIds.length > 1 ? model.eosIds : eos,
      pad_token_id: padId ?? eos,
      type: knownTypes.has(model.modelType) ? model.modelType : 'decoder',
      vocab_size: model.vocab,
    },
    search: {
      diversity_penalty: 0,
      do_sample: false,
      early_stopping: true,
      length_penalty: 1,
      max_length: model.context,
      min_length: 0,
      no_repeat_ngram_size: 0,
      num_beams: 1,
      num_return_sequences: 1,
      past_present_share_buffer: false,
      repetition_penalty: 1,
      temperature: 1,
      top_k: 50,
      top_p: 1,
    },
  };
}
