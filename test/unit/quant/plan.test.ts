import { afterAll, describe, expect, it } from 'vitest';
import { layoutWriters } from '../../../src/layout/detect.js';
import { openModel, type OpenModel } from '../../../src/arch/open.js';
import { planOutput } from '../../../src/quant/output.js';
import { makePlan } from '../../../src/quant/plan.js';
import { bitsPerWeight, checkRecipe, defaultRecipe, fitGroup, type Recipe } from '../../../src/quant/scheme.js';
import { defaultScope, leaveOut, namePattern } from '../../../src/quant/select.js';
import { fitWidths } from '../../../src/quant/widths.js';
import { archCase, fixture, shared } from '../../arch/support.js';
import { existsSync } from 'node:fs';

const layout = layoutWriters['compressed-tensors'];
const opened: OpenModel[] = [];
afterAll(async () => {
  for (const open of opened) await open.close();
});
async function open(...path: string[]): Promise<OpenModel> {
  const model = await openModel(fixture(...path));
  opened.push(model);
  return model;
}
const plan = (model: OpenModel, recipe: Partial<Recipe> = {}, selection = { scope: 'all', keep: [] as string[] }) =>
  makePlan(model.model, model.checkpoint, { ...defaultRecipe, ...recipe }, selection, layout);

describe('groups', () => {
  it('are the ones asked for where they divide, else padded, smaller, or whole rows', () => {
    expect(fitGroup(512, 128, false)).toEqual({ group: 128, columns: 512 });
    expect(fitGroup(512, -1, true)).toEqual({ group: 0, columns: 512 });
    expect(fitGroup(64, 128, false)).toMatchObject({ group: 64, columns: 64 });
    expect(fitGroup(1376, 128, true)).toMatchObject({ group: 128, columns: 1408 });
    // 256 would be half as wide again; 192 in groups of 64 is not.
    expect(fitGroup(172, 128, true)).toMatchObject({ group: 64, columns: 192 });
    expect(fitGroup(172, 128, false)).toMatchObject({ group: 0, columns: 172 });
    expect(fitGroup(20, 128, true)).toMatchObject({ group: 32, columns: 32 });
    expect(fitGroup(96, 128, false).note).toMatch(/group 32.*96 columns/);
  });

  it('outside 32..1024 and the powers of two are refused', () => {
    for (const groupSize of [0, 16, 96, 2048, -2]) {
      expect(() => checkRecipe({ ...defaultRecipe, groupSize })).toThrow(/--group-size/);
    }
    for (const groupSize of [-1, 32, 128, 1024]) checkRecipe({ ...defaultRecipe, groupSize });
  });

  it('cost scales and zero points', () => {
    expect(bitsPerWeight({ bits: 4, group: 128, symmetric: true }, 512, 16)).toBe(4.125);
    expect(bitsPerWeight({ bits: 4, group: 32, symmetric: false }, 512, 16)).toBe(4.625);
    expect(bitsPerWeight({ bits: 4, group: 0, symmetric: true }, 512, 32)).toBe(4 + 32 / 512);
  });
});

describe('names', () => {
  it('match whole parts of a dotted name, or an expression', () => {
    expect(namePattern('down_proj').matches('model.layers.0.mlp.down_proj')).toBe(true);
    expect(namePattern('layers.1').matches('model.layers.11.mlp.down_proj')).toBe(false);
    expect(namePattern('re:layers\\.1\\d\\.').matches('model.layers.11.mlp.down_proj')).toBe(true);
    expect(() => namePattern('re:(')).toThrow(/regular expression/);
  });

  it('that match nothing are refused with what was meant', async () => {
    const { model } = await open('v1.0/v1.0_checkpoint.bin');
    expect(() => leaveOut(model.blocks, { scope: 'all', keep: ['donw_proj'] })).toThrow(/Did you mean down_proj/);
    expect(() => leaveOut(model.blocks, { scope: 'attn', keep: [] })).toThrow(/No linear has a name/);
  });

  it('keep fused partners together', async () => {
    const model = await open('v1.0/v1.0_checkpoint.bin');
    const { linears } = plan(model, {}, { scope: 'all', keep: ['layers.1.self_attn.k_proj'] });
    expect(linears.get('model.layers.1.self_attn.k_proj')?.reason).toBe('kept by --keep layers.1.self_attn.k_proj');
    for (const name of ['q_proj', 'v_proj']) {
      expect(linears.get(`model.layers.1.self_attn.${name}`)?.reason).toMatch(/fuse it with .*k_proj/);
    }
    expect(linears.get('model.layers.1.self_attn.o_proj')?.scheme).toBeDefined();
    expect(linears.get('model.layers.0.self_attn.q_proj')?.scheme).toBeDefined();
  });
});

describe('the plan of a model', () => {
  it('names every linear, with a scheme or a reason', async () => {
    const model = await open('v1.0/v1.0_checkpoint.bin');
    const { linears, use, totals } = plan(model);
    expect(linears.size).toBe(29);
    expect([...linears.values()].every(({ scheme, reason }) => (scheme === undefined) !== (reason === undefined))).toBe(
      true,
    );
    expect(use.ignore).toEqual(['lm_head']);
    expect(use.groups).toHaveLength(1);
    expect(totals).toMatchObject({ quantized: 28, left: 1, bitsPerWeight: 4.125 });
  });

  it('plans the output in the order of the source, copying what is not quantized', async () => {
    const model = await open('v1.0/v1.0_checkpoint.bin');
    const output = planOutput(model, plan(model), (linear, scheme, dtype) => layout.plan(linear, scheme, dtype));
    const sources = [...model.checkpoint.tensors.keys()];
    const names = output.tensors.map(({ planned }) => planned.name.replace(/_(packed|scale|shape)$/, ''));
    expect([...new Set(names)]).toEqual(sources);
    const copied = output.tensors.filter(({ origin }) => origin.kind === 'copy').map(({ planned }) => planned.name);
    expect(copied).toEqual(sources.filter((name) => !name.includes('_proj')));
    expect(
      [...output.through.values()]
        .flat()
        .map(({ planned }) => planned.name)
        .sort(),
    ).toEqual([...copied].sort());
  });

  it('leaves routers alone and takes the routed experts alone when told so', async () => {
    const model = await open('moe-6m');
    expect(defaultScope(model.model.modelType)).toBe('experts');
    expect(defaultScope('llama')).toBe('all');
    const all = [...plan(model).linears.values()];
    for (const { linear, scheme } of all) {
      const high = linear.role === 'router' || linear.role === 'head';
      expect(scheme === undefined, linear.name).toBe(high);
    }
    const experts = [...plan(model, {}, { scope: 'experts', keep: [] }).linears.values()];
    for (const { linear, scheme } of experts) expect(scheme !== undefined, linear.name).toBe(linear.role === 'expert');
    expect(experts.some(({ scheme }) => scheme)).toBe(true);
  });

  it('keeps all experts of a layer when one is kept', async () => {
    const model = await open('moe-6m');
    const { linears } = plan(model, {}, { scope: 'all', keep: ['layers.1.mlp.experts.3.down_proj'] });
    const layer = [...linears.values()].filter(({ linear, block }) => linear.role === 'expert' && block === 1);
    expect(layer.length).toBe(24);
    expect(layer.every(({ scheme }) => scheme === undefined)).toBe(true);
    expect(linears.get('model.layers.2.mlp.experts.3.down_proj')?.scheme).toBeDefined();
  });

  it('refuses to do nothing', async () => {
    const model = await open('v1.0/v1.0_checkpoint.bin');
    expect(() => plan(model, {}, { scope: 'experts', keep: [] })).toThrow(/nothing to quantize/);
  });
});

describe('widths that no group divides', () => {
  it('are padded with zeros alike in all layers, and the config says so', async () => {
    const path = shared('models', 'stories260k');
    if (!existsSync(path)) return console.warn('skipped: ../shared/models/stories260k is not there');
    const model = await openModel(path);
    opened.push(model);
    const { linears, config, notes, use } = plan(model);
    expect(config).toEqual({ intermediate_size: 192 });
    const down = linears.get('model.layers.3.mlp.down_proj')!;
    expect(down.stored).toMatchObject({ outFeatures: 64, inFeatures: 192 });
    expect(down.scheme?.group).toBe(64);
    expect(linears.get('model.layers.3.mlp.up_proj')!.stored).toMatchObject({ outFeatures: 192, inFeatures: 64 });
    expect(linears.get('model.layers.3.self_attn.q_proj')!.scheme?.group).toBe(64);
    expect(notes.join('\n')).toMatch(/172 inner channels padded to 192/);
    expect(use.groups).toHaveLength(1);
  });

  it('are not padded where other parts of the checkpoint follow the same config', async () => {
    const { model } = await open('moe-6m');
    const odd = { ...model, config: { ...model.config } };
    expect(fitWidths(odd, 128, false).stored.size).toBe(0);
    expect(fitWidths(odd, 128, false).config).toEqual({});
  });

  it('give the three linears of an expert one group', async () => {
    const mixtral = await openModel(archCase('mixtral'));
    opened.push(mixtral);
    const { model } = mixtral;
    const { groups, config } = fitWidths(model, 128, true);
    const ffn = model.blocks[0]!.moe!.expertLinears[0]!;
    const of = (['gate', 'up', 'down'] as const).map((part) => groups.get(ffn[part].name));
    expect(new Set(of).size).toBe(1);
    for (const [key, width] of Object.entries(config)) {
      expect(key).toBe('intermediate_size');
      expect(width % (of[0] || 1)).toBe(0);
    }
  });
});
