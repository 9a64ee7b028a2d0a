import { badUsage } from '../base/errors.js';
import type { Block } from '../arch/types.js';
import { bitWidths, type Override, type SchemeChange } from './scheme.js';
import { fusedPartners, namePattern, requireMatch } from './select.js';

/**
 * `down_proj=8`, `layers.0=bits:8,group:64`, `re:experts=asym`: a pattern, and what its linears get in place of the
 * recipe's own scheme. Undefined: not of this form.
 */
export function parseOverride(given: string): Override | undefined {
  const at = given.lastIndexOf('=');
  if (at < 1) return undefined;
  let change: SchemeChange = {};
  for (const part of given.slice(at + 1).split(',')) {
    const match = /^(?:(?:(bits):)?(\d+)|(group):(-1|\d+)|(sym|asym))$/.exec(part.trim());
    if (!match) return undefined;
    if (match[2] !== undefined) {
      const bits = bitWidths.find((width) => width === Number(match[2]));
      if (bits === undefined) return undefined;
      change = { ...change, bits };
    } else if (match[4] !== undefined) change = { ...change, groupSize: Number(match[4]) };
    else change = { ...change, symmetric: match[5] === 'sym' };
  }
  return { pattern: given.slice(0, at), ...change };
}

/**
 * What the overrides give to each linear, by name; fused partners get what one of them gets.
 * Errors: a pattern that matches nothing; partners that would get different schemes.
 */
export function changesOf(
  blocks: readonly Pick<Block, 'linears'>[],
  overrides: readonly Override[],
): Map<string, SchemeChange> {
  const changes = new Map<string, SchemeChange>();
  const names = blocks.flatMap(({ linears }) => linears.flat().map(({ name }) => name));
  const patterns = overrides.map(({ pattern, ...change }) => ({ pattern: namePattern(pattern), change }));
  for (const { pattern } of patterns) requireMatch(pattern, names);
  if (patterns.length === 0) return changes;
  for (const partners of blocks.flatMap(({ linears }) => fusedPartners(linears))) {
    const last = (name: string) => patterns.findLast(({ pattern }) => pattern.matches(name));
    const found = partners.map(({ name }) => ({ name, hit: last(name) })).filter(({ hit }) => hit !== undefined);
    const [first] = found;
    if (first === undefined) continue;
    const other = found.find(({ hit }) => JSON.stringify(hit!.change) !== JSON.stringify(first.hit!.change));
    if (other) {
      throw badUsage('Linears that engines fuse cannot get different schemes', {
        where: `${first.name} by --override ${first.hit!.pattern.given}, ${other.name} by --override ${other.hit!.pattern.given}`,
        expected: 'one scheme for q/k/v, for gate/up, for all experts of a layer',
      });
    }
    for (const { name } of partners) changes.set(name, first.hit!.change);
  }
  return changes;
}
