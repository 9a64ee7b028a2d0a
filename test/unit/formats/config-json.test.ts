import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { formatConfig } from '../../../src/formats/config-json.js';
import { parseJson } from '../../../src/formats/json.js';

describe('formatConfig', () => {
  it('writes floats that transformers insists on, also where they are whole numbers', () => {
    const config = {
      rms_norm_eps: 1,
      routed_scaling_factor: 2,
      hidden_size: 2,
      rope_parameters: { rope_theta: 10000 },
    };
    expect(formatConfig(config)).toBe(`{
  "rms_norm_eps": 1.0,
  "routed_scaling_factor": 2.0,
  "hidden_size": 2,
  "rope_parameters": {
    "rope_theta": 10000.0
  }
}
`);
  });

  it('writes what Python reads back: lists, empty values, infinities, text', () => {
    const config = {
      a: [1, 2.5],
      b: [],
      c: {},
      d: [0, Infinity, NaN, -Infinity],
      e: 'é"\n',
      f: null,
      long_factor: [1, 2],
    };
    const text = formatConfig(config);
    expect(text).toContain('1.0,\n    2.0');
    expect(parseJson(text, { where: 'x', lenient: true })).toEqual(config);
  });

  it("gives back transformers' own config.json but for 1e-06", () => {
    const path = new URL('../../../fixtures/v1.0/v1.0_checkpoint.config.json', import.meta.url);
    const text = readFileSync(path, 'utf8');
    const config = parseJson(text, { where: 'x', lenient: true }) as Record<string, unknown>;
    expect(formatConfig(config)).toBe(`${text.trimEnd().replace('1e-06', '0.000001')}\n`);
  });
});
