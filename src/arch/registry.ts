import { badInput, didYouMean } from '../base/errors.js';
import { Config } from './config.js';
import { deepseek, deepseekV2, deepseekV3, deepseekV32 } from './deepseek.js';
import { deepseekV4 } from './deepseek-v4.js';
import { deepseekOcr2, deepseekVl } from './deepseek-vl.js';
import { glm4Moe } from './glm4-moe.js';
import { llama } from './llama.js';
import { mistral } from './mistral.js';
import { mixtral } from './mixtral.js';
import { olmoe } from './olmoe.js';
import { qwen2, qwen3 } from './qwen.js';
import { qwen2Moe, qwen3Moe } from './qwen-moe.js';
import type { Model } from './types.js';

/** model_type -> its architecture. A new one is a file and a line here (docs/adding-an-architecture.md). */
const architectures: Readonly<Record<string, (c: Config) => Model>> = {
  deepseek,
  deepseek_ocr2: deepseekOcr2,
  deepseek_v2: deepseekV2,
  deepseek_v3: deepseekV3,
  deepseek_v32: deepseekV32,
  deepseek_v4: deepseekV4,
  deepseek_vl: deepseekVl,
  deepseek_vl_hybrid: deepseekVl,
  glm4_moe: glm4Moe,
  llama,
  mistral,
  mixtral,
  olmoe,
  qwen2,
  qwen2_moe: qwen2Moe,
  qwen3,
  qwen3_moe: qwen3Moe,
};

export const modelTypes: readonly string[] = Object.keys(architectures).sort();

/**
 * What a config.json describes. `where` names it in errors; `stores` tells which tensors the checkpoint has, if any is
 * at hand.
 * Errors: unknown model_type, keys that are wrong, missing or not understood.
 */
export function buildModel(
  config: Readonly<Record<string, unknown>>,
  where: string,
  stores?: (name: string) => boolean,
): Model {
  const c = new Config(config, where, 'model', stores);
  const type = c.raw('model_type');
  if (typeof type !== 'string') {
    throw badInput('The configuration does not say what model this is', {
      where,
      got: type === undefined ? 'no model_type' : `model_type ${JSON.stringify(type)}`,
      expected: `model_type: one of ${modelTypes.join(', ')}`,
    });
  }
  const build = Object.hasOwn(architectures, type) ? architectures[type] : undefined;
  if (!build) {
    const near = didYouMean(type, modelTypes);
    throw badInput('This architecture is not supported', {
      where,
      got: `model_type ${JSON.stringify(type)}`,
      expected: `one of ${modelTypes.join(', ')}`,
      ...(type === 'phi3'
        ? {
            hint: 'Its fused matrices make it a Llama with other names: deepseek-convert convert IN -o OUT --fuse split.',
          }
        : near !== undefined && { hint: `Did you mean ${near}?` }),
    });
  }
  const model = build(c);
  c.finish();
  return model;
}
