import { join } from 'node:path';
import { bug } from '../base/errors.js';
import { encodingName } from '../formats/ggml.js';
import { plannedBytes, plannedEncoding } from './layout.js';
import type { OutputLayout } from './layout.js';
import { locate } from './locate.js';
import { checkIndex, parseFile } from './parse.js';
import type { OpenedFile } from './parse.js';
import { planKey } from './types.js';
import type { PlannedTensor } from './types.js';

/** Reads the finished output with our own reader and compares names, shapes, element types, sizes and places. */
export async function verifyOutput(
  folder: string,
  layout: OutputLayout,
  tensors: readonly PlannedTensor[],
): Promise<void> {
  const planned = new Map(tensors.map((tensor) => [planKey(tensor), tensor]));
  const parsedFiles = new Map<string, OpenedFile>();
  for (const { name, readThrough } of layout.files) {
    if (readThrough === undefined) parsedFiles.set(name, await parseFile(join(folder, name)));
  }
  const files = layout.files.map((file) => ({ file, parsed: parsedFiles.get(file.readThrough ?? file.name)! }));
  for (const { file, parsed } of files) {
    const fail = (what: string, name: string, expected: string, got: string): never => {
      throw bug(`The output that was written reads back differently: ${what}`, {
        where: `${parsed.path}, tensor ${JSON.stringify(name)}`,
        expected,
        got,
        hint: 'Please report this; the unfinished output was kept.',
      });
    };
    const path = join(folder, file.name);
    const own = parsed.tensors.filter(({ span }) => span.bytes === 0 || span.path === path);
    const found = new Map(own.map((tensor) => [tensor.name, tensor]));
    for (const { names, position } of file.extents) {
      for (const key of names) {
        const plan = planned.get(key)!;
        const { name, shape } = plan;
        const entry = found.get(name);
        if (entry === undefined) return fail('a tensor is missing', name, 'a tensor', 'none');
        const want = `${encodingName(plannedEncoding(plan))} [${shape.join(', ')}], ${plannedBytes(plan)} bytes`;
        const got = `${encodingName(entry.encoding)} [${entry.shape.join(', ')}], ${entry.span.bytes} bytes`;
        if (want !== got || entry.strides !== undefined) return fail('another tensor', name, want, got);
        if (entry.span.offset !== position && entry.span.bytes > 0) {
          return fail('another place', name, `byte ${position}`, `byte ${entry.span.offset}`);
        }
        found.delete(name);
      }
    }
    const [extra] = found.keys();
    if (extra !== undefined) fail('a tensor too many', extra, 'none', 'a tensor');
  }
  // The index, too, as a reader takes it.
  const index = layout.index && (await locate(folder)).index;
  if (index) checkIndex([...parsedFiles.values()], index);
}
