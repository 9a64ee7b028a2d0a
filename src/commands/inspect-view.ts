import { storedWeights } from '../arch/stored.js';
import type { Statistics } from '../arch/statistics.js';
import { OpenFiles } from '../arch/files.js';
import { formatBytes, writeFileAtomic } from '../base/files.js';
import { columns } from '../base/text.js';
import { diagram } from './inspect-diagram.js';
import type { LookValues, Seen, Stored } from './inspect-look.js';
import { outlierChannels, statsText } from './inspect-stats.js';
import { share, tensorTree, treeText } from './inspect-tree.js';
import { openEnvironment } from './shared.js';
import { encodingName } from './summary.js';
import type { Io } from './types.js';

/** The closer look: parts for the terminal, numbers for --json, and the page. */
export async function view(seen: Seen, given: LookValues, io: Io) {
  const { checkpoint, model, stored } = seen;
  const statistics = given.stats ? await statisticsOf(seen, given, io) : undefined;
  const wantsTree = given.tree || given.html !== undefined;
  const tree = wantsTree ? tensorTree([...checkpoint.tensors.values()].map((entry) => ({ name: entry.name, type: encodingName(entry), shape: entry.shape, bytes: entry.span.bytes }))) : []; // prettier-ignore
  const parts: string[] = [];
  if (given.diagram) {
    parts.push(model ? diagram(model, stored, io.width) : 'No picture: the architecture is not known.');
  }
  if (given.tree) {
    parts.push(
      `${io.paint.bold('By type')}\n${bars(seen.types, io)}`,
      `${io.paint.bold('Tensors')} (sizes of all repeats together)\n${treeText(tree, io.paint, io.width)}`,
    );
  }
  if (statistics) parts.push(statsText(statistics, io.paint, io.width));
  if (given.html !== undefined) {
    const { inspectPage } = await import('./inspect-html.js');
    await writeFileAtomic(given.html, inspectPage(seen, tree, statistics));
    parts.push(`page: ${given.html}`);
  }
  const data = {
    ...(given.tree && { tree }),
    ...(statistics && { statistics: { ...statistics, outlierChannels: outlierChannels(statistics.tensors) } }),
    ...(given.html !== undefined && { html: given.html }),
  };
  return { data, parts };
}

async function statisticsOf({ checkpoint, model, stored }: Seen, given: LookValues, io: Io): Promise<Statistics> {
  const { weightStatistics } = await import('../arch/statistics.js');
  const shapes = new Map([...(model?.outer ?? []), ...(model?.blocks.flatMap((b) => b.tensors) ?? [])].map((s) => [s.name, s.shape])); // prettier-ignore
  const weights = stored.size > 0 ? stored : storedWeights(checkpoint.tensors, undefined);
  // Packed codes may stand for a few inputs more than there are: the architecture knows.
  const exact = [...weights].map(([name, one]) => [name, one.linear ? { ...one, shape: shapes.get(name) ?? one.shape } : one] as const); // prettier-ignore
  const files = new OpenFiles();
  try {
    using env = await openEnvironment(given, io);
    return await weightStatistics({ tensors: new Map(exact), file: (path) => files.get(path) }, env);
  } finally {
    await files.close();
  }
}

/** Bytes of each type as bars. */
function bars(types: readonly Stored[], { paint, width }: Io): string {
  const total = types.reduce((n, { bytes }) => n + bytes, 0);
  const room = Math.max(10, Math.min(40, width - 42));
  const bar = (bytes: number) => paint.cyan('█'.repeat(total === 0 ? 0 : Math.max(1, Math.round((room * bytes) / total)))); // prettier-ignore
  return columns(types.map((t) => [t.type, String(t.tensors), formatBytes(t.bytes), share(t.bytes, total), bar(t.bytes)]), 'lrrrl'); // prettier-ignore
}
