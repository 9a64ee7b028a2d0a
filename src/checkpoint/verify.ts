import { join } from 'node:path';
import { bug } from '../base/errors.js';
import { encodingName } from '../formats/ggml.js';
import { plannedBytes, plannedEncoding } from './layout.js';
import type { OutputLayout } from './layout.js';
import { readContainers } from './open.js';
import type { PlannedTensor } from './types.js';

/** Reads the finished output with our own reader and compares names, shapes, element types, sizes and places. */
export async function verifyOutput(
  folder: string,
  layout: OutputLayout,
  tensors: readonly PlannedTensor[],
): Promise<void> {
  const lone = layout.index === undefined && layout.files.length === 1;
  const { tensors: found } = await readContainers(lone ? join(folder, layout.files[0]!.name) : folder);
  const places = new Map<string, { path: string; offset: number }>();
  for (const { name, extents } of layout.files) {
    for (const { names, position } of extents) {
      for (const tensor of names) places.set(tensor, { path: join(folder, name), offset: position });
    }
  }
  const fail = (what: string, name: string, expected: string, got: string): never => {
    throw bug(`The output that was written reads back differently: ${what}`, {
      where: `${folder}, tensor ${JSON.stringify(name)}`,
      expected,
      got,
      hint: 'Please report this; the unfinished output was kept.',
    });
  };
  for (const tensor of tensors) {
    const { name } = tensor;
    const entry = found.get(name);
    if (entry === undefined) return fail('a tensor is missing', name, 'a tensor', 'none');
    const want = `${encodingName(plannedEncoding(tensor))} [${tensor.shape.join(', ')}], ${plannedBytes(tensor)} bytes`;
    const got = `${encodingName(entry.encoding)} [${entry.shape.join(', ')}], ${entry.span.bytes} bytes`;
    if (want !== got || entry.strides !== undefined) return fail('another tensor', name, want, got);
    const { path, offset } = places.get(name)!;
    if (entry.span.path !== path || (entry.span.offset !== offset && entry.span.bytes > 0)) {
      return fail('another place', name, `${path}, byte ${offset}`, `${entry.span.path}, byte ${entry.span.offset}`);
    }
  }
  const extra = [...found.keys()].find((name) => !places.has(name));
  if (extra !== undefined) fail('a tensor too many', extra, 'none', 'a tensor');
}
