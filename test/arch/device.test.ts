// Every architecture on every device: fp32 there against fp32 on the CPU tightly, bf16 against fp32 within what rounding
// explains, greedy text the same as transformers'. CUDA takes part with DEEPSEEK_CONVERT_TEST_CUDA=1 (npm run test:gpu);
// without it the CPU, with one thread, stands in its place.
import { existsSync, readdirSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { generate } from '../../src/arch/generate.js';
import { openModel } from '../../src/arch/open.js';
import { ResidentModel } from '../../src/arch/resident.js';
import type { Device } from '../../src/backend/device.js';
import { openDevice } from '../../src/backend/load.js';
import { Scope } from '../../src/tensor/tensor.js';
import { archCase, expected, fixture, relativeError } from './support.js';

const bounds = {
  /** fp32: max |difference| over max |logit|. */
  f32: 1e-4,
  /** bf16: normalised mean squared error of the logits of a position, the median over positions. */
  position: 1e-3,
  /** bf16, over all logits; where tokens choose experts, a near tie may go the other way at a few positions. */
  all: 1e-3,
  allChosen: 2e-2,
} as const;

const { signal } = new AbortController();

interface Case {
  readonly name: string;
  readonly path: () => string;
  readonly expected: string;
}
const folders = readdirSync(fixture('arch'), { withFileTypes: true }).filter((entry) => entry.isDirectory());
const cases: Case[] = [
  ...folders.map(({ name }) => ({
    name,
    path: () => archCase(name),
    expected: fixture('arch', name, 'expected.safetensors'),
  })),
  ...[
    ['dense-6m, trained', fixture('v1.0', 'v1.0_checkpoint.bin'), 'dense-6m'] as const,
    ['moe-6m, trained', fixture('moe-6m'), 'moe-6m'] as const,
  ]
    .filter(([, path]) => existsSync(path))
    .map(([name, path, of]) => ({ name, path: () => path, expected: fixture('arch', `${of}.expected.safetensors`) })),
];

const kinds = process.env.DEEPSEEK_CONVERT_TEST_CUDA === '1' ? (['cpu', 'cuda'] as const) : (['cpu'] as const);
describe.each(kinds)('architectures on %s', (kind) => {
  let reference: Device;
  let device: Device;
  beforeAll(() => {
    reference = openDevice({ kind: 'cpu', poison: true });
    device = kind === 'cpu' ? openDevice({ kind, threads: 1, poison: true }) : openDevice({ kind, poison: true });
  });
  afterAll(() => {
    reference.close();
    device.close();
  });

  test.each(cases.map((one) => [one.name, one] as const))('%s', async (_, one) => {
    const want = expected(one.expected);
    const tokens = want.tokens!.i32;
    const rows = want.lengths ? [...want.lengths.i32] : [tokens.length];
    const open = await openModel(one.path());
    const logits = async (on: Device, dtype: 'f32' | 'bf16'): Promise<Float32Array[]> => {
      using resident = await ResidentModel.load(open, { device: on, signal }, dtype);
      using scope = new Scope(on);
      const x = resident.hidden(scope, tokens, rows.length, { lengths: rows });
      const all = await resident.logits(scope, x).float32();
      const [length, vocab] = [tokens.length / rows.length, open.model.vocab];
      // One array a position; padding is left out.
      return rows.flatMap((n, row) =>
        Array.from({ length: n }, (_, t) => all.subarray((row * length + t) * vocab, (row * length + t + 1) * vocab)),
      );
    };
    const exact = await logits(reference, 'f32');
    const same = await logits(device, 'f32');
    const joined = (positions: readonly Float32Array[]) => positions.flatMap((p) => [...p]);
    expect(relativeError(joined(same), joined(exact)), 'fp32').toBeLessThan(bounds.f32);

    const rounded = await logits(device, 'bf16');
    const errors = rounded.map((position, i) => distance([position], [exact[i]!])).sort((a, b) => a - b);
    expect(errors[errors.length >> 1], 'bf16, a position').toBeLessThan(bounds.position);
    const chosen = open.model.blocks.some((block) => block.moe);
    expect(distance(rounded, exact), 'bf16').toBeLessThan(chosen ? bounds.allChosen : bounds.all);

    using resident = await ResidentModel.load(open, { device, signal }, 'f32');
    const model = resident.model as { context: number };
    model.context = Math.max(model.context, 64);
    const env = { device, signal };
    const prompt = tokens.slice(0, want.lengths ? 4 : 12);
    const [text] = await generate(resident, env, [prompt], { maxNewTokens: 32, greedy: true, stopIds: [] });
    expect([...text!.tokens]).toEqual([...want.greedy!.i32]);
    await open.close();
  });
});

/** Normalised mean squared error. */
function distance(got: readonly Float32Array[], want: readonly Float32Array[]): number {
  let [error, energy] = [0, 0];
  got.forEach((position, p) =>
    position.forEach((x, i) => {
      error += (x - want[p]![i]!) ** 2;
      energy += want[p]![i]! ** 2;
    }),
  );
  return error / energy;
}
