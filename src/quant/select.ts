import { badUsage, didYouMean } from '../base/errors.js';
import type { LinearSpec } from '../nn/calls.js';

/** What `--scope` and `--keep` say: a part of a dotted name (`down_proj`, `layers.0`), or `re:` and an expression. */
export interface NamePattern {
  readonly given: string;
  matches(name: string): boolean;
}

export function namePattern(given: string): NamePattern {
  if (!given.startsWith('re:')) {
    return { given, matches: (name) => `.${name}.`.includes(`.${given}.`) };
  }
  let expression: RegExp;
  try {
    expression = new RegExp(given.slice(3));
  } catch (cause) {
    throw badUsage('A name pattern is no regular expression', { got: given, cause });
  }
  return { given, matches: (name) => expression.test(name) };
}

export interface Selection {
  /** `all`: every linear of the blocks; `experts`: routed experts only; else those whose names match. */
  readonly scope: string;
  /** Patterns of linears to leave in high precision. */
  readonly keep: readonly string[];
}

/**
 * Why each linear is left in high precision, by name; the ones to quantize are not in the map. Linears that engines
 * fuse (q/k/v, gate/up, all experts of a layer) are quantized together or not at all.
 * Errors: a pattern that matches nothing.
 */
export function leaveOut(
  blocks: readonly { readonly linears: readonly (readonly LinearSpec[])[] }[],
  { scope, keep }: Selection,
): Map<string, string> {
  const inScope = scope === 'all' || scope === 'experts' ? undefined : namePattern(scope);
  const kept = keep.map(namePattern);
  const all = blocks.flatMap(({ linears }) => linears.flat());
  const names = all.map(({ name }) => name);
  for (const pattern of [...kept, ...(inScope ? [inScope] : [])]) requireMatch(pattern, names);
  const reasons = new Map<string, string>();
  for (const { name, role } of all) {
    const keeper = kept.find((pattern) => pattern.matches(name));
    if (role === 'other') reasons.set(name, 'engines compute it in high precision');
    else if (keeper) reasons.set(name, `kept by --keep ${keeper.given}`);
    else if (inScope && !inScope.matches(name)) reasons.set(name, `outside --scope ${scope}`);
    else if (inScope)
      continue; // named by the user: even a router
    else if (role === 'router') reasons.set(name, 'a router stays in high precision');
    else if (scope === 'experts' && role !== 'expert') reasons.set(name, 'outside --scope experts');
  }
  for (const { linears } of blocks) addPartners(linears, reasons);
  return reasons;
}

/** Error: a pattern that matches none of the names. */
export function requireMatch(pattern: NamePattern, names: readonly string[]): void {
  if (names.some((name) => pattern.matches(name))) return;
  const parts = new Set(names.flatMap((name) => [name, ...name.split('.')]));
  const near = didYouMean(pattern.given, parts);
  throw badUsage('No linear has a name like the one given', {
    got: pattern.given,
    expected: 'a part of a name such as self_attn.q_proj or layers.0, or re:<regular expression>',
    ...(near !== undefined && { hint: `Did you mean ${near}?` }),
  });
}

/**
 * Linears of a block that engines fuse: those that share an input (but routers and such stand alone), and all experts
 * together. They share a scheme.
 */
export function fusedPartners(groups: readonly (readonly LinearSpec[])[]): LinearSpec[][] {
  const experts = groups.filter((group) => group.some(({ role }) => role === 'expert')).flat();
  const alone = ({ role }: LinearSpec) => role === 'router' || role === 'other';
  const others = groups
    .filter((group) => group.every(({ role }) => role !== 'expert'))
    .flatMap((group) => [group.filter((linear) => !alone(linear)), ...group.filter(alone).map((linear) => [linear])]);
  return experts.length > 0 ? [...others, experts] : others;
}

function addPartners(groups: readonly (readonly LinearSpec[])[], reasons: Map<string, string>): void {
  for (const partners of fusedPartners(groups)) {
    const out = partners.find(({ name }) => reasons.has(name));
    if (!out) continue;
    const reason = reasons.get(out.name)!;
    for (const { name } of partners) {
      if (!reasons.has(name)) reasons.set(name, `engines fuse it with ${out.name}: ${reason}`);
    }
  }
}

/** What `--scope auto` means: for DeepSeek's own architectures the routed experts, where published recovery is best. */
export const defaultScope = (modelType: string): string => (modelType.startsWith('deepseek') ? 'experts' : 'all');
