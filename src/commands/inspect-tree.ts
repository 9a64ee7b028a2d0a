import type { Paint } from '../base/paint.js';
import { formatBytes } from '../base/files.js';
import { columns, displayWidth } from '../base/text.js';

/** A tensor as the tree shows it. */
export interface Leaf {
  readonly name: string;
  readonly type: string;
  readonly shape: readonly number[];
  readonly bytes: number;
}

/** One line of the tree: a tensor, or what lies below a part of names. Alike neighbours with numbers are one line. */
export interface Branch {
  /** `model`, `layers.0-31`, `q_proj.weight`. */
  readonly label: string;
  /** How many alike branches it stands for. */
  readonly times: number;
  /** Of all of them together, and of all above it. */
  readonly bytes: number;
  readonly tensors: number;
  /** Present where each of them is a tensor. */
  readonly leaf?: Pick<Leaf, 'type' | 'shape'>;
  readonly branches: readonly Branch[];
}

interface Node {
  leaf?: Leaf;
  readonly below: Map<string, Node>;
}

/** Names by their parts, repeats folded: `layers.0-31` is 32 layers with the same tensors of the same types and shapes. */
export function tensorTree(leaves: Iterable<Leaf>): Branch[] {
  const root: Node = { below: new Map() };
  for (const leaf of leaves) {
    let node = root;
    for (const part of leaf.name.split('.')) {
      let next = node.below.get(part);
      if (!next) node.below.set(part, (next = { below: new Map() }));
      node = next;
    }
    node.leaf = leaf;
  }
  return branchesOf(root, 1).map(({ branch }) => branch);
}

interface Signed {
  readonly branch: Branch;
  /** What it holds, without its own name: equal for alike neighbours. */
  readonly signature: string;
}

function branchesOf(node: Node, times: number): Signed[] {
  const entries = [...node.below];
  // Files hold layer 10 before layer 2.
  if (entries.every(([key]) => /^\d+$/.test(key))) entries.sort((a, b) => Number(a[0]) - Number(b[0]));
  const signatures = entries.map(([, child]) => signatureOf(child));
  const made: Signed[] = [];
  for (let i = 0; i < entries.length;) {
    const [key, child] = entries[i]!;
    let end = i + 1;
    if (/^\d+$/.test(key)) {
      while (end < entries.length && signatures[end] === signatures[i] && Number(entries[end]![0]) === Number(key) + end - i) end++; // prettier-ignore
    }
    const label = end - i > 1 ? `${key}-${entries[end - 1]![0]}` : key;
    made.push({ branch: branchOf(label, child, times * (end - i), end - i), signature: signatures[i]! });
    i = end;
  }
  return made;
}

/** A name with nothing beside what is below it is one line with that: `q_proj.weight`, `layers.0-31`. */
function branchOf(label: string, node: Node, times: number, repeats: number): Branch {
  const inside = branchesOf(node, times).map(({ branch }) => branch);
  const only = inside.length === 1 && !node.leaf ? inside[0]! : undefined;
  if (only && (repeats === 1 || only.leaf)) {
    return { ...only, label: `${label}.${only.label}`, times: repeats * only.times };
  }
  const { leaf } = node;
  const own = leaf ? { bytes: leaf.bytes * times, tensors: times } : { bytes: 0, tensors: 0 };
  const total = inside.reduce((sum, { bytes, tensors }) => ({ bytes: sum.bytes + bytes, tensors: sum.tensors + tensors }), own); // prettier-ignore
  return { label, times: repeats, ...total, ...(leaf && { leaf }), branches: inside };
}

const signatures = new WeakMap<Node, string>();
function signatureOf(node: Node): string {
  const known = signatures.get(node);
  if (known !== undefined) return known;
  const own = node.leaf ? `${node.leaf.type}[${node.leaf.shape.join()}]` : '';
  const made = `${own}{${[...node.below].map(([key, child]) => `${key}:${signatureOf(child)}`).sort().join(' ')}}`; // prettier-ignore
  signatures.set(node, made);
  return made;
}

/** The tree with box-drawing lines; sizes are those of all repeats together. */
export function treeText(branches: readonly Branch[], paint: Paint, width: number): string {
  const total = branches.reduce((n, { bytes }) => n + bytes, 0);
  const rows: string[][] = [];
  const walk = (list: readonly Branch[], indent: string) => {
    for (const [i, branch] of list.entries()) {
      const last = i === list.length - 1;
      const [corner, below] = indent === '' && list === branches ? ['', ''] : last ? ['└─ ', '   '] : ['├─ ', '│  '];
      const name = branch.leaf ? branch.label : paint.bold(branch.label);
      const times = branch.times > 1 ? paint.cyan(`  x ${branch.times}`) : '';
      const kind = branch.leaf ? `${branch.leaf.type} [${branch.leaf.shape.join(', ')}]` : '';
      rows.push([`${paint.dim(indent + corner)}${name}${times}`, kind, formatBytes(branch.bytes), share(branch.bytes, total)]); // prettier-ignore
      // Roots stand at the edge, and what is below them one step in.
      walk(branch.branches, indent + below);
    }
  };
  walk(branches, '');
  const whole = columns(rows, 'llrr');
  const fits = whole.split('\n').every((line) => displayWidth(line) <= width);
  // What a narrow terminal lacks room for is said least by the share.
  return fits ? whole : columns(rows.map((row) => row.slice(0, 3)), 'llr'); // prettier-ignore
}

export const share = (part: number, whole: number): string => {
  const percent = (100 * part) / whole;
  return whole === 0 ? '' : `${percent >= 9.95 || percent === 0 ? percent.toFixed(0) : percent.toFixed(1)}%`;
};
