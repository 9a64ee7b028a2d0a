import type { LinearSpec } from '../nn/calls.js';
import type { Block, Model } from '../arch/types.js';
import { fitGroup } from './scheme.js';

/** A gated feed-forward network: rows of gate and up, columns of down are its inner channels. */
interface Ffn {
  readonly gate: LinearSpec;
  readonly up: LinearSpec;
  readonly down: LinearSpec;
  readonly role: 'mlp' | 'expert' | 'shared-expert';
  /** How often the config's width this one is (shared experts are stored as one network). */
  readonly times: number;
  readonly key: string | undefined;
}

/** How wide a model's feed-forward networks are stored, and the groups that fit. */
export interface Widths {
  /** Linears whose stored shape differs from the model's. */
  readonly stored: ReadonlyMap<string, { readonly outFeatures: number; readonly inFeatures: number }>;
  /** Groups for the linears of feed-forward networks; others take what `fitGroup` says of their inputs. */
  readonly groups: ReadonlyMap<string, number>;
  /** Changed keys of config.json. */
  readonly config: Readonly<Record<string, number>>;
  /** For the report: what was padded or got another group, one sentence each. */
  readonly notes: readonly string[];
}

function ffnsOf(block: Block, config: Readonly<Record<string, unknown>>): Ffn[] {
  const ffns: Ffn[] = [];
  const add = (role: Ffn['role'], gate: LinearSpec, up: LinearSpec, down: LinearSpec) => {
    const width = gate.outFeatures;
    const keys =
      role === 'mlp'
        ? ['intermediate_size']
        : role === 'expert'
          ? ['moe_intermediate_size', 'intermediate_size']
          : ['shared_expert_intermediate_size', 'moe_intermediate_size'];
    const key = keys.find((name) => {
      const value = config[name];
      return typeof value === 'number' && width % value === 0 && (role === 'shared-expert' || width === value);
    });
    ffns.push({ gate, up, down, role, key, times: key === undefined ? 1 : width / (config[key] as number) });
  };
  if (block.ffn) add('mlp', block.ffn.gate, block.ffn.up, block.ffn.down);
  for (const { gate, up, down } of block.moe?.expertLinears ?? []) add('expert', gate, up, down);
  const shared = block.linears.filter((group) => group[0]?.role === 'shared-expert');
  const [pair, last] = [shared.find((group) => group.length === 2), shared.find((group) => group.length === 1)];
  if (pair && last) add('shared-expert', pair[0]!, pair[1]!, last[0]!);
  return ffns;
}

/**
 * Fits groups to feed-forward networks. Inner channels may be padded with zeros, which changes nothing: act(0) 0 = 0
 * meets a zero column. One config key rules the width of many networks, so all of them are padded alike; where that
 * cannot be (`padding` off, no such key), groups shrink instead. A routed expert's three linears share one group.
 */
export function fitWidths(model: Model, groupSize: number, padding: boolean): Widths {
  const stored = new Map<string, { outFeatures: number; inFeatures: number }>();
  const groups = new Map<string, number>();
  const config: Record<string, number> = {};
  const notes = new Set<string>();
  const ffns = model.blocks.flatMap((block) => ffnsOf(block, model.config));
  // Experts first: where they share a key with others, their group decides the width.
  const units = new Map<string, { columns: number; group: number }>();
  for (const role of ['expert', 'mlp', 'shared-expert'] as const) {
    for (const ffn of ffns.filter((one) => one.role === role)) {
      const { gate, up, down, key, times } = ffn;
      const outer = fitGroup(gate.inFeatures, groupSize, false);
      // One scheme for all three of an expert; the dense ones' down_proj may differ from gate and up.
      const wanted = role === 'expert' ? (outer.group === 0 ? -1 : outer.group) : groupSize;
      const unit = gate.outFeatures / times;
      let fit = key === undefined ? undefined : units.get(key);
      if (fit === undefined) {
        fit = fitGroup(unit, wanted, padding && key !== undefined);
        if (key !== undefined) units.set(key, fit);
        if (fit.columns !== unit) config[key!] = fit.columns;
      }
      const width = fit.columns * times;
      const inner = fitGroup(width, wanted, false);
      const note = (linear: LinearSpec, text: string | undefined) => {
        if (text !== undefined) notes.add(`${patternOf(linear.name)}: ${text}`);
      };
      if (width !== gate.outFeatures) {
        note(down, `${gate.outFeatures} inner channels padded to ${width} with zeros, group ${inner.group}`);
        stored.set(gate.name, { outFeatures: width, inFeatures: gate.inFeatures });
        stored.set(up.name, { outFeatures: width, inFeatures: up.inFeatures });
        stored.set(down.name, { outFeatures: down.outFeatures, inFeatures: width });
      } else note(down, inner.note);
      groups.set(down.name, inner.group);
      for (const linear of [gate, up]) groups.set(linear.name, role === 'expert' ? inner.group : outer.group);
      note(gate, outer.note);
    }
  }
  return { stored, groups, config, notes: [...notes] };
}

/** `model.layers.3.mlp.down_proj` -> `model.layers.*.mlp.down_proj`: one line for all layers. */
export const patternOf = (name: string): string => name.replace(/(?<=\.)\d+(?=\.)/g, '*');
