import { expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { isCapped } from '../../src/arch/types.js';
import { planGguf } from '../../src/checkpoint/gguf-model.js';
import { makePlan } from '../../src/moe/plan.js';
import { buildOnnx } from '../../src/targets/onnx/decoder.js';
import { badInputMessage } from '../support/refusal.js';
import { archCase } from './support.js';

test('what has no place for soft caps refuses them: mixtures, GGUF, ONNX', async () => {
  for (const key of ['attn_logit_softcapping', 'final_logit_softcapping']) {
    const open = await openModel(archCase('llama', { config: (c) => (c[key] = 5) }));
    expect(isCapped(open.model)).toBe(true);
    const recipe = { method: 'split', container: 'glm4_moe', experts: 4, active: 2 } as const;
    expect(await badInputMessage(() => makePlan(open, recipe, false))).toMatch(/soft caps/);
    expect(await badInputMessage(planGguf(open.checkpoint, 'f32'))).toMatch(new RegExp(key));
    expect(await badInputMessage(() => buildOnnx(open.model, 'f32', {} as Parameters<typeof buildOnnx>[2]))).toMatch(
      /Soft caps/,
    );
    await open.close();
  }
  const plain = await openModel(archCase('llama'));
  expect(isCapped(plain.model)).toBe(false);
  await plain.close();
});
