import { describe, expect, it } from 'vitest';
import { adamw, fakeQuant, fakeQuantBackward } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { fixture, nmse, noise, weights } from './quant-cases.js';
import { onDevices } from './support.js';

onDevices('training ops', (device) => {
  const expected = fixture('quant');
  const bf16 = (x: Float32Array) => Uint16Array.from(new Uint32Array(x.slice().buffer), (u) => u >>> 16);

  describe('fake_quant', () => {
    for (const name of ['symmetric', 'asymmetric']) {
      it(`and its gradients are PyTorch's, ${name}`, async () => {
        using s = new Scope(device());
        const [n, k] = [5, 70];
        const of = (key: string) => expected.f32(`fake.${name}.${key}`);
        const grid = {
          scale: s.from('f32', [n, 5], of('scale')),
          zero: name === 'asymmetric' ? s.from('f32', [n, 5], of('zero')) : undefined,
          low: -8,
          high: 7,
          group: 16,
        };
        const w = s.from('f32', [n, k], weights(70000, n, k));
        const dy = s.from('bf16', [n, k], bf16(noise(70001, n * k).map((v) => v / 256)));
        expect(nmse(await fakeQuant(s, w, grid).float32(), of('y'))).toBeLessThan(1e-12);
        const { dw, dscale, dzero } = fakeQuantBackward(s, dy, w, grid);
        // dy is rounded towards zero to bf16 here: a relative 2^-8 at most
        expect(nmse(await dw.float32(), of('dw'))).toBeLessThan(2e-5);
        const exact = fakeQuantBackward(
          s,
          s.from(
            'f32',
            [n, k],
            noise(70001, n * k).map((v) => v / 256),
          ),
          w,
          grid,
        );
        expect(nmse(await exact.dw.float32(), of('dw'))).toBeLessThan(1e-12);
        expect(nmse(await exact.dscale.float32(), of('dscale'))).toBeLessThan(1e-10);
        expect(nmse(await dscale.float32(), of('dscale'))).toBeLessThan(1e-3);
        expect(dzero !== undefined).toBe(name === 'asymmetric');
        if (exact.dzero) expect(nmse(await exact.dzero.float32(), of('dzero'))).toBeLessThan(1e-10);
        expect(of('dw').some((v) => v === 0)).toBe(true);
      });
    }
    it('is a fixed point of itself', async () => {
      using s = new Scope(device());
      const grid = {
        scale: s.from('f32', [2, 1], Float32Array.of(0.25, -0.5)),
        zero: undefined,
        low: -8,
        high: 7,
        group: 33,
      };
      const y = fakeQuant(s, s.from('f32', [2, 33], weights(3, 2, 33)), grid);
      expect(await fakeQuant(s, y, grid).float32()).toEqual(await y.float32());
    });
  });

  it('four steps of adamw are those of torch.optim.AdamW', async () => {
    using s = new Scope(device());
    const p = s.from(
      'f32',
      [300],
      noise(71000, 300).map((v) => v / 256),
    );
    const [m, v] = [s.zeros('f32', [300]), s.zeros('f32', [300])];
    const clip = s.from('f32', [1], Float32Array.of(0.5));
    for (let step = 1; step <= 4; step++) {
      const g = s.from(
        'f32',
        [300],
        noise(71000 + step, 300).map((x) => x / 512),
      );
      adamw(p, m, v, g, { step, lr: 0.01, beta2: 0.95, eps: 1e-6, decay: 0.1, clip });
    }
    expect(nmse(await p.float32(), expected.f32('adamw.p'))).toBeLessThan(1e-12);
  });
});
