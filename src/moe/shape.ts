import { badUsage } from '../base/errors.js';

/**
 * Group-limited routing (DeepSeek-V3, section 2.1.2): consecutive experts form `groups` groups, and a token takes its experts
 * from the `topGroups` whose two best experts have the largest sums of scores.
 */
export interface GroupLimit {
  readonly groups: number;
  readonly topGroups: number;
}

/** How many experts a token takes, and out of which groups; without a limit out of all. */
export interface Choice {
  readonly active: number;
  readonly limit?: GroupLimit | undefined;
}

/** How one feed-forward network is cut. */
export interface MoeShape extends Choice {
  /** Experts that the router chooses from: n_routed_experts. */
  readonly routed: number;
  /** Experts' worth of neurons that every token uses, beside the routed ones. */
  readonly shared: number;
  /** Neurons of one expert, padding included. */
  readonly width: number;
  /** Neurons of the dense network. */
  readonly ffn: number;
}

export const pieces = ({ routed, shared }: Pick<MoeShape, 'routed' | 'shared'>): number => routed + shared;
/** Neurons of all experts together, padding included. */
export const capacity = (shape: MoeShape): number => pieces(shape) * shape.width;
/** Share of the neurons that a token leaves out. */
export const partOff = (shape: MoeShape): number => (shape.routed - shape.active) / pieces(shape);

/** `auto`, `none`, or the number that widths are to be multiples of. */
export type Padding = 'auto' | 'none' | number;

/** Largest share of zero neurons that `auto` takes for widths that engines and INT4 groups like. */
const autoOverhead = 1 / 8;

/**
 * The width of each of `count` equal experts for `ffn` neurons. `auto` rounds up to the largest power of two (up to
 * 128) that adds at most an eighth; a number rounds up to its multiples; `none` refuses what does not divide.
 */
export function expertWidth(ffn: number, count: number, padding: Padding): number {
  const plain = Math.ceil(ffn / count);
  if (count > ffn) {
    throw badUsage('More experts than neurons', { got: `${count} experts (shared ones included)`, expected: `at most ${ffn}` }); // prettier-ignore
  }
  if (padding === 'none') {
    if (ffn % count === 0) return plain;
    throw badUsage('The feed-forward width does not divide by the number of experts', {
      got: `${ffn} neurons, ${count} experts (shared ones included)`,
      expected: `a divisor of ${ffn}${nearDivisors(ffn, count)}`,
      hint: 'Choose --experts and --shared so that their sum divides, or allow padding with zero neurons: --pad auto.',
    });
  }
  if (padding !== 'auto') return Math.ceil(plain / padding) * padding;
  for (let multiple = 128; multiple > 1; multiple /= 2) {
    const width = Math.ceil(plain / multiple) * multiple;
    if (width * count <= ffn * (1 + autoOverhead)) return width;
  }
  return plain;
}

function nearDivisors(n: number, near: number): string {
  const divisors = Array.from({ length: n }, (_, i) => i + 1).filter((d) => n % d === 0);
  const below = divisors.filter((d) => d < near).at(-1);
  const above = divisors.find((d) => d > near);
  return ` (${[below, above].filter((d) => d !== undefined).join(' or ')} are the nearest)`;
}
