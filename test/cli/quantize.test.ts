import { existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { cli, fixture, json, listing, v1, workFolder } from './support.js';

const folder = workFolder();
const small = ['--calibration', fixture('samples.jsonl'), '--samples', '4', '--seq-len', '32', '--progress', 'none', '--no-validate']; // prettier-ignore
const out = (name: string): string => join(folder, name);

interface Done {
  readonly ok: boolean;
  readonly totals: { quantized: number; left: number; bitsPerWeight: number };
  readonly linears: readonly { name: string; error: number; plainError: number; method: string }[];
  readonly left: readonly { name: string; reason: string }[];
  readonly verified: number;
  readonly calibration: string | null;
}

describe('quantize', () => {
  it('makes a folder that other tools load, and says what it did', async () => {
    const run = await cli(['quantize', v1, '-o', out('int4'), ...small, '--quiet']);
    expect(run.stderr).toBe('');
    expect(run.code).toBe(0);
    expect(run.stdout).toMatch(/28 linears at 4\.13 bits a weight, 1 left in high precision/);
    expect(run.stdout).toMatch(/verified 28 linears/);
    expect(listing(out('int4'))).toEqual([
      'README.md',
      'config.json',
      'deepseek-convert.json',
      'model.safetensors',
      'tokenizer.json',
      'tokenizer_config.json',
    ]);
    const inspected = await cli(['inspect', out('int4'), '--json']);
    expect(inspected.code).toBe(0);
    expect(inspected.stdout).toContain('compressed-tensors');
    const generated = await cli(['generate', out('int4'), '--prompt', 'The', '--max-new-tokens', '3', '--greedy', '--progress', 'none']); // prettier-ignore
    expect(generated.code).toBe(0);
  });

  it('gives one object with --json', async () => {
    const run = await cli(['quantize', v1, '-o', out('json'), ...small, '--group-size', '64', '--asym', '--keep', 'layers.0', '--json']); // prettier-ignore
    expect(run.code).toBe(0);
    const done = json<Done>(run);
    expect(done.ok).toBe(true);
    expect(done.totals).toMatchObject({ quantized: 21, left: 8 });
    expect(done.linears).toHaveLength(21);
    expect(done.verified).toBe(21);
    for (const { error, plainError } of done.linears) expect(error).toBeLessThan(plainError);
    expect(done.left.map(({ reason }) => reason)).toContain('kept by --keep layers.0');
    expect(done.calibration).toMatch(/^4 x 32 tokens/);
    const config = JSON.parse(readFileSync(join(out('json'), 'config.json'), 'utf8')) as {
      quantization_config: { config_groups: { group_0: { weights: Record<string, unknown> } }; ignore: string[] };
    };
    const { weights } = config.quantization_config.config_groups.group_0;
    expect(weights).toMatchObject({ num_bits: 4, group_size: 64, symmetric: false, strategy: 'group' });
    expect(config.quantization_config.ignore).toContain('model.layers.0.mlp.down_proj');
  });

  it('rounds without calibration text when told --method rtn', async () => {
    const run = await cli(['quantize', v1, '-o', out('rtn'), '--method', 'rtn', '--json', '--progress', 'none']);
    const done = json<Done>(run);
    expect(run.code).toBe(0);
    expect(done.calibration).toBeNull();
    expect(new Set(done.linears.map(({ method }) => method))).toEqual(new Set(['rtn']));
  });

  it('shows a plan with --dry-run and writes nothing', async () => {
    const run = await cli(['quantize', v1, '-o', out('plan'), '--dry-run']);
    expect(run.code).toBe(0);
    expect(run.stdout).toMatch(/model\.layers\.\*\.mlp\.down_proj +\[256, 1024\] +x 4 +int4 g128 symmetric/);
    expect(run.stdout).toMatch(/lm_head.*left: the head stays in high precision/);
    expect(run.stdout).toMatch(/output 6\.2\d MB \(input 12\.1 MB\)/);
    expect(existsSync(out('plan'))).toBe(false);
    expect(existsSync(out('plan.part'))).toBe(false);
    const { tensors } = json<{ tensors: { name: string }[] }>(await cli(['quantize', v1, '-o', out('plan'), '--dry-run', '--json'])); // prettier-ignore
    expect(tensors.map(({ name }) => name)).toContain('model.layers.0.self_attn.q_proj.weight_packed');
  });
});

describe('schemes by name', () => {
  it('may stand in a job file', async () => {
    const job = join(folder, 'job.yaml');
    writeFileSync(job, 'quantize:\n  override:\n    - down_proj=8\n    - layers.0.self_attn.k_proj=bits:3,group:64\n');
    const run = await cli(['quantize', v1, '-o', out('plan'), '--dry-run', '--config-file', job]);
    expect(run.code, run.stderr).toBe(0);
    expect(run.stdout).toMatch(/down_proj +\[256, 1024\] +x 4 +int8 g128 symmetric/);
    expect(run.stdout).toMatch(/v_proj +\[128, 256\] +x 1 +int3 g64 symmetric/);
    expect(run.stdout).toMatch(/v_proj +\[128, 256\] +x 3 +int4 g128 symmetric/);
    const wrong = await cli(['quantize', v1, '-o', out('plan'), '--override', 'down_proj=5']);
    expect(wrong.code).toBe(2);
    expect(wrong.stderr).toMatch(/--override is not understood.*down_proj=5/);
  });
});

describe('quantize refuses', () => {
  const refused: [string, string[], number, RegExp][] = [
    ['an output that exists', [v1, '-o', folder], 1, /exists already/],
    ['a file as output', [v1, '-o', out('x.bin')], 2, /folder/],
    ['a group size that no target has', [v1, '-o', out('x'), '--group-size', '96'], 2, /--group-size.*96|96.*power of two/s],
    ['a number of bits that it does not know', [v1, '-o', out('x'), '--bits', '5'], 2, /4 or 8/],
    ['a name that no linear has', [v1, '-o', out('x'), '--keep', 'donw_proj'], 2, /Did you mean down_proj/],
    ['windows longer than the context', [v1, '-o', out('x'), '--seq-len', '100000'], 2, /--seq-len/],
    ['text that is not there', [v1, '-o', out('x'), '--calibration', 'nowhere.txt'], 1, /nowhere\.txt/],
    ['settings of learned rounding with another method', [v1, '-o', out('x'), '--rounding-steps', '9'], 2, /--rounding-steps goes with --method autoround/],
    ['a model that is not there', [out('nowhere'), '-o', out('x')], 1, /nowhere/],
  ]; // prettier-ignore
  for (const [what, args, code, message] of refused) {
    it(`${what} (exit ${code}) and leaves nothing`, async () => {
      const run = await cli(['quantize', ...args]);
      expect(run.stderr).toMatch(message);
      expect(run.code).toBe(code);
      expect(run.stdout).toBe('');
      for (const name of ['x', 'x.part', 'x.bin', 'x.bin.part']) expect(existsSync(out(name)), name).toBe(false);
    });
  }

  it('a checkpoint with weights that are not finite, by name, and keeps no output', async () => {
    const bad = join(folder, 'bad');
    mkdirSync(bad);
    for (const name of ['tokenizer.json', 'tokenizer_config.json']) writeFileSync(join(bad, name), readFileSync(fixture(`v1.0/${name}`))); // prettier-ignore
    writeFileSync(join(bad, 'config.json'), readFileSync(fixture('v1.0/v1.0_checkpoint.config.json')));
    const convert = await cli(['convert', v1, '-o', join(folder, 'plain'), '--progress', 'none']);
    expect(convert.code).toBe(0);
    const bytes = readFileSync(join(folder, 'plain/model.safetensors'));
    const header = JSON.parse(bytes.subarray(8, 8 + Number(bytes.readBigUInt64LE(0))).toString()) as Record<string, { data_offsets: [number, number] }>; // prettier-ignore
    const at = 8 + Number(bytes.readBigUInt64LE(0)) + header['model.layers.2.mlp.gate_proj.weight']!.data_offsets[0];
    bytes.writeUInt16LE(0x7fc0, at + 400); // bf16 NaN
    writeFileSync(join(bad, 'model.safetensors'), bytes);
    const run = await cli(['quantize', bad, '-o', out('nan'), ...small]);
    expect(run.code).toBe(1);
    expect(run.stderr).toMatch(/not finite.*model\.layers\.2\.mlp\.gate_proj/);
    expect(existsSync(out('nan'))).toBe(false);
  });
});
