import type { Paint } from '../base/paint.js';
import { columns, count } from '../base/text.js';
import { show } from '../base/html/markup.js';
import type { ChannelStatistics, Statistics, TensorStatistics } from '../arch/statistics.js';

const mostChannels = 15;

/** Numbers of all tensors whose names differ in digits only. */
export interface KindStatistics {
  readonly kind: string;
  readonly tensors: number;
  readonly values: number;
  readonly mean: number | null;
  readonly std: number | null;
  readonly absmax: number | null;
  readonly zeros: number;
  readonly nonFinite: number;
  readonly outliers: number;
}

/** A channel that stands out, with the tensor that it is of. */
export interface OutlierChannel {
  readonly name: string;
  readonly of: ChannelStatistics['of'];
  readonly index: number;
  readonly absmax: number;
  /** To the median channel of the tensor. */
  readonly ratio: number;
}

/** `model.layers.3.mlp.experts.7.down_proj.weight` -> `model.layers.*.mlp.experts.*.down_proj.weight`. */
const kindOf = (name: string): string => name.replace(/(^|\.)\d+(?=\.|$)/g, '$1*');

export function byKind(tensors: readonly TensorStatistics[]): KindStatistics[] {
  const kinds = new Map<string, TensorStatistics[]>();
  for (const one of tensors) {
    const kind = kindOf(one.name);
    const alike = kinds.get(kind);
    if (alike) alike.push(one);
    else kinds.set(kind, [one]);
  }
  return [...kinds].map(([kind, all]) => {
    const sum = (of: (t: TensorStatistics) => number) => all.reduce((n, t) => n + of(t), 0);
    const finite = sum((t) => t.values - t.nonFinite);
    const weighted = (of: (t: TensorStatistics) => number) => sum((t) => (t.mean === null ? 0 : of(t) * (t.values - t.nonFinite))) / finite; // prettier-ignore
    const mean = weighted((t) => t.mean!);
    const square = weighted((t) => t.std! ** 2 + (t.mean! - mean) ** 2);
    const none = finite === 0;
    return {
      ...{ kind, tensors: all.length, values: sum((t) => t.values) },
      mean: none ? null : mean,
      std: none ? null : Math.sqrt(square),
      absmax: none ? null : all.reduce((n, t) => Math.max(n, t.absmax ?? 0), 0),
      zeros: sum((t) => t.zeros),
      nonFinite: sum((t) => t.nonFinite),
      outliers: sum((t) => t.channels.reduce((n, c) => n + c.outliers, 0)),
    };
  });
}

export const outlierChannels = (tensors: readonly TensorStatistics[]): OutlierChannel[] =>
  tensors
    .flatMap(({ name, channels }) => channels.flatMap(({ of, worst }) => worst.map((w) => ({ name, of, ...w }))))
    .sort((a, b) => b.ratio - a.ratio);

/** What narrow terminals have room for: `mlp.experts.*.down_proj`. */
const plainKind = (kind: string): string => kind.replace(/^.*\blayers\.\*\.|^model\./, '').replace(/\.weight$/, '');

const statsHeads = ['weights', 'tensors', 'mean', 'std', 'absmax', 'zeros', 'outliers'];

function statsRow(of: KindStatistics): string[] {
  const zeros = of.zeros === 0 ? '0' : `${show((100 * of.zeros) / of.values, 2)}%`;
  return [show(of.mean, 2), show(of.std), show(of.absmax), zeros, String(of.outliers)];
}

/** Three parts: what each kind of tensor is like, the worst channels, what is not finite. */
export function statsText(statistics: Statistics, paint: Paint, width: number): string {
  const { tensors, skipped } = statistics;
  const kinds = byKind(tensors);
  const shorten = (name: string, most: number) => (name.length > most ? `…${name.slice(1 - most)}` : name);
  const room = Math.max(24, width - 48);
  const rows = kinds.map((k) => [shorten(plainKind(k.kind), room), String(k.tensors), ...statsRow(k)]);
  const parts = [columns([statsHeads.map((head) => paint.bold(head)), ...rows], 'lrrrrrr')];
  const channels = outlierChannels(tensors);
  const worst = channels.slice(0, mostChannels);
  if (worst.length > 0) {
    const lines = worst.map((c) => [shorten(c.name, width - 40), `${c.of} ${c.index}`, show(c.absmax), `${show(c.ratio)} x`]); // prettier-ignore
    const all = tensors.reduce((n, t) => n + t.channels.reduce((m, c) => m + c.outliers, 0), 0);
    const head = `Outlier channels (largest magnitude against the median channel's): ${count(all)}${all > worst.length ? `, the worst ${worst.length}` : ''}`;
    parts.push(`${paint.bold(head)}\n${columns(lines, 'llrr')}`);
  } else {
    parts.push('No outlier channels: none has four times the magnitude of the median one.');
  }
  const broken = tensors.filter(({ nonFinite }) => nonFinite > 0);
  if (broken.length > 0) {
    const lines = broken.slice(0, mostChannels).map((t) => [t.name, `${count(t.nonFinite)} of ${count(t.values)}`]);
    const more = broken.length > lines.length ? ` (the first ${lines.length} of ${broken.length})` : '';
    parts.push(`${paint.bold(paint.red(`Values that are not finite${more}`))}\n${columns(lines, 'lr')}`);
  }
  if (skipped.length > 0) {
    const reasons = [...new Set(skipped.map(({ reason }) => reason))].join(', ');
    parts.push(`${paint.yellow('note:')} ${skipped.length} tensors have no weights to look at: ${reasons}.`);
  }
  return parts.join('\n\n');
}
