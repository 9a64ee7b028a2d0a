import { deepseekOcrText } from './deepseek.js';
import { Config } from './config.js';
import { llama } from './llama.js';
import type { Model } from './types.js';

/**
 * Vision-language models: the language model inside is processed, everything that sees is carried through untouched.
 * Only text goes through our forward pass, as transformers computes it when it is given no image.
 */
function wrapper(
  c: Config,
  text: (inner: Config) => Model,
  { types, root, tied, carried }: { types: string[]; root: string; tied: boolean; carried: string[] },
): Model {
  const inner = c.object('text_config');
  if (!inner) throw c.wrong('text_config', 'the settings of the language model');
  c.understood('vision_config', 'high_res_vision_config', 'image_token_id', 'image_token_index');
  inner.only('model_type', ...types);
  // Whether embedding and head are one tensor is said outside; inside the key has no effect.
  const language = new Config(
    { ...inner.values, model_type: c.raw('model_type'), tie_word_embeddings: c.bool('tie_word_embeddings', tied) },
    inner.where,
    root,
  );
  const model = text(language);
  language.finish();
  const ids = { bos: c.ids('bos_token_id'), eos: c.ids('eos_token_id') };
  return {
    ...model,
    config: c.values,
    carried: [...model.carried, ...carried],
    bosId: ids.bos[0] ?? model.bosId,
    eosIds: ids.eos.length > 0 ? ids.eos : model.eosIds,
  };
}

/** DeepSeek-VL (Lu et al. 2024) and its hybrid with a second, high-resolution tower: Llama inside. */
export const deepseekVl = (c: Config): Model =>
  wrapper(c, llama, {
    types: ['llama'],
    root: 'model.language_model',
    tied: true,
    carried: ['model.vision_model.', 'model.aligner.', 'model.high_res_vision_'],
  });

/** DeepSeek-OCR 2: DeepSeek-V2's experts on ordinary attention inside. */
export const deepseekOcr2 = (c: Config): Model =>
  wrapper(c, deepseekOcrText, {
    types: ['deepseek_ocr2_text'],
    root: 'model',
    tied: false,
    // The third name is spelt like this in the published weights.
    carried: [
      'model.projector.',
      'model.qwen2_model.',
      'model.view_seperator',
      'model.view_separator',
      'model.sam_model.',
    ],
  });
