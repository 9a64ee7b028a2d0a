import { elementCount } from '../base/dtype.js';
import { count, displayWidth, short } from '../base/text.js';
import type { Block, Model, TensorSpec } from '../arch/types.js';
import type { StoredWeight } from '../arch/stored.js';

/** Runs of alike layers beyond which they are shown by kind instead: patterns that alternate. */
const mostRuns = 5;
const widest = 72;

type Line = readonly [name: string, what: string, parameters: string];
interface Box {
  readonly title: string;
  readonly lines: readonly Line[];
}

/**
 * The model from tokens to logits: a box for the embedding, for each kind of layer, for the head. The loops on the left
 * are residuals; numbers on the right are parameters of one layer.
 */
export function diagram(model: Model, stored: ReadonlyMap<string, StoredWeight>, width: number): string {
  const there = (spec: TensorSpec) => (spec.optional !== true || stored.has(spec.name)) && spec.below === undefined;
  const size = (specs: readonly TensorSpec[]) =>
    specs.filter(there).reduce((n, { shape }) => n + elementCount(shape), 0);
  const streams = model.stateWidth / model.hidden;
  const embedding = model.outer.filter(({ name }) => name === model.embedding);
  const rest = model.outer.filter(({ name }) => name !== model.embedding && !(model.tied && name === `${model.head.name}.weight`)); // prettier-ignore
  const boxes: Box[] = [
    {
      title: '',
      lines: [['embedding', `${count(model.vocab)} x ${count(model.hidden)}${streams > 1 ? `, ${streams} streams` : ''}`, short(size(embedding))]],
    },
    ...kinds(model.blocks).map(({ blocks }) => layerBox(blocks, size)),
    { title: '', lines: [['norm, head', `to ${count(model.vocab)} logits${model.tied ? ', tied to the embedding' : ''}`, short(size(rest))]] },
  ]; // prettier-ignore
  return draw(boxes, Math.min(width, widest));
}

/** Neighbours that are alike; where these alternate, all that are alike. */
function kinds(blocks: readonly Block[]): { blocks: Block[] }[] {
  const runs: { signature: string; blocks: Block[] }[] = [];
  for (const block of blocks) {
    const signature = signatureOf(block);
    if (runs.at(-1)?.signature === signature) runs.at(-1)!.blocks.push(block);
    else runs.push({ signature, blocks: [block] });
  }
  if (runs.length <= mostRuns) return runs;
  const all = new Map<string, { blocks: Block[] }>();
  for (const { signature, blocks: some } of runs) {
    const kind = all.get(signature);
    if (kind) kind.blocks.push(...some);
    else all.set(signature, { blocks: some });
  }
  return [...all.values()];
}

const signatureOf = ({ name, tensors, window, moe }: Block): string =>
  [window, moe?.active, ...tensors.map((t) => `${t.name.slice(name.length)}[${t.shape.join()}]`)].join(' ');

function layerBox(blocks: readonly Block[], size: (specs: readonly TensorSpec[]) => number): Box {
  const block = blocks[0]!;
  const norms = new Set([block.norms.attention, block.norms.feedForward].map(({ name }) => `${name}.weight`));
  const attention = new Set(block.attention.tensors.map(({ name }) => name));
  const other = block.tensors.filter(({ name }) => !attention.has(name) && !norms.has(name));
  const lines: Line[] = [
    ['┌─ norm', '', ''],
    ['│  attention', describeAttention(block), short(size(block.attention.tensors))],
    ['└─ +', '', ''],
    ['┌─ norm', '', ''],
    [`│  ${block.moe ? 'experts' : 'feed-forward'}`, describeFeedForward(block), short(size(other))],
    ['└─ +', '', ''],
  ];
  const times = blocks.length > 1 ? `${blocks.length} x  ` : '';
  return { title: `${times}layer${blocks.length > 1 ? 's' : ''} ${ranges(blocks.map(({ index }) => index))}`, lines };
}

function describeAttention({ attention, window }: Block): string {
  const { grouped, latent } = attention;
  const near = window ? `, window ${count(window)}` : '';
  if (grouped) {
    const { heads, kvHeads, headDim } = grouped;
    return `${heads} heads of ${headDim}${kvHeads < heads ? `, ${kvHeads} for keys and values` : ''}${near}`;
  }
  if (latent) {
    const queries = 'down' in latent.q ? `, queries by ${latent.q.down.outFeatures}` : '';
    return `${latent.heads} heads, latent ${latent.rank} + ${latent.rope.dim}${queries}${latent.indexer ? ', sparse' : ''}${near}`;
  }
  return `compressed${near}`;
}

function describeFeedForward({ ffn, moe }: Block): string {
  if (moe) {
    const shared = moe.shared > 0 ? `, ${moe.shared} shared` : '';
    return `${moe.experts} of width ${count(moe.width)}, ${moe.active} active${shared}`;
  }
  return ffn ? `${count(ffn.gate.inFeatures)} -> ${count(ffn.gate.outFeatures)}, gated ${ffn.activation}` : '';
}

/** `0-2, 5, 7-9`. */
function ranges(indices: readonly number[]): string {
  const runs: [number, number][] = [];
  for (const i of indices) {
    const last = runs.at(-1);
    if (last?.[1] === i - 1) last[1] = i;
    else runs.push([i, i]);
  }
  const shown = runs.slice(0, 6).map(([from, to]) => (from === to ? String(from) : `${from}-${to}`));
  return `${shown.join(', ')}${runs.length > shown.length ? ' ...' : ''}`;
}

function draw(boxes: readonly Box[], width: number): string {
  const inner = width - 4;
  const middle = 6;
  const stem = ' '.repeat(middle);
  const first = Math.max(...boxes.flatMap(({ lines }) => lines.map(([name]) => displayWidth(name)))) + 2;
  const border = (left: string, fill: string, right: string, mark: string) =>
    `${left}${fill.repeat(middle - 1)}${mark}${fill.repeat(width - middle - 2)}${right}`;
  const rows = [`${stem.slice(3)}tokens`, `${stem}│`];
  for (const { title, lines } of boxes) {
    const top = border('┌', '─', '┐', '┴');
    const label = title === '' ? '' : ` ${title} `;
    rows.push(`${top.slice(0, middle + 3)}${label}${top.slice(middle + 3 + label.length)}`);
    for (const [name, what, parameters] of lines) {
      const text = name.padEnd(first) + what;
      // A line that is too long loses its end, never its number.
      const room = inner - parameters.length - 1;
      const fitting = text.length > room ? `${text.slice(0, room - 1)}…` : text.padEnd(room);
      rows.push(`│ ${fitting} ${parameters} │`);
    }
    rows.push(border('└', '─', '┘', '┬'));
  }
  rows.push(`${stem}│`, `${stem.slice(3)}logits`);
  return rows.join('\n');
}
