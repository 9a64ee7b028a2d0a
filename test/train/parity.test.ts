import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { Scope } from '../../src/tensor/tensor.js';
import { EndToEnd } from '../../src/train/end-to-end.js';
import { StudentReader } from '../../src/train/student.js';
import { fixture, testEnv, trainedModel } from '../arch/support.js';

interface Expected {
  settings: { steps: number; batch: number; length: number; warmup: number; lr: number; decay: number; clip: number };
  tokens: number[];
  losses: number[];
  norms: number[];
}

const env = testEnv();
const { settings, tokens, losses, norms } = JSON.parse(
  readFileSync(fixture('train', 'parity.json'), 'utf8'),
) as Expected;
const { steps, batch, length, warmup, lr, decay, clip } = settings;
/** Relative difference that is allowed at every step. */
const bound = 1e-3;

test.each([
  ['20 steps, activations kept', steps, false, batch],
  ['5 steps, activations computed again, gradients of two passes added up', 5, true, batch / 2],
])(
  'dense-6m follows transformers and torch.optim.AdamW: %s',
  async (_, some, recompute, microBatch) => {
    const open = await openModel(trainedModel('v1.0', 'v1.0_checkpoint.bin')!);
    using scope = new Scope(env.device);
    const reader = new StudentReader(open, env.device, 'f32');
    const outer = await reader.plain(undefined, scope);
    const blocks = [];
    for (const block of open.model.blocks) blocks.push(await reader.plain(block, scope));
    using training = new EndToEnd({
      ...{ env, stage: 'parity', model: open.model, outer, blocks, recompute, batch, microBatch, length, warmup, lr },
      loss: { crossEntropy: 1, kl: 0, hidden: 0 },
      tokens: Int32Array.from(tokens),
      n: steps * batch,
      held: 0,
      epochs: 1,
      adam: { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay, clip },
      seed: 0,
      inOrder: true,
      judgements: 1,
      stopAfter: some,
      resumeHint: '',
    });
    const outcome = await training.train();
    expect(outcome.steps).toHaveLength(some);
    outcome.steps.forEach((step, i) => {
      expect(Math.abs(step.loss / losses[i]! - 1), `loss of step ${i + 1}`).toBeLessThan(bound);
      expect(Math.abs(step.norm / norms[i]! - 1), `norm of step ${i + 1}`).toBeLessThan(bound);
    });
    await open.close();
  },
  120_000,
);
