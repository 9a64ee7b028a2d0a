import { open, rm, type FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import type { ByteSource } from '../../base/bytes.js';
import { bug } from '../../base/errors.js';
import { ioError, processId, renameDurable } from '../../base/files.js';
import type { TensorSink } from '../../checkpoint/types.js';
import type { PlannedTarget } from '../formats.js';
import { plannedBytes } from '../output.js';
import type { QuantPlan } from '../plan.js';

/** Where a block's tensors of one output lie in their file: in the order of the plan, one behind the other. */
export interface BlockLayout {
  readonly bytes: number;
  readonly tensors: ReadonlyMap<string, { readonly offset: number; readonly bytes: number }>;
}

/** Follows from the plan alone, so that a file needs no header that somebody would have to believe. By block index. */
export function blockLayouts({ output }: PlannedTarget, { linears }: QuantPlan): Map<number, BlockLayout> {
  const blockOf = new Map<string, number>();
  for (const [block, list] of output.through) for (const { planned } of list) blockOf.set(planned.name, block);
  const layouts = new Map<number, { bytes: number; tensors: Map<string, { offset: number; bytes: number }> }>();
  for (const { planned, origin } of output.tensors) {
    const block = blockOf.get(planned.name) ?? (origin.kind === 'linear' ? linears.get(origin.name)?.block : undefined);
    if (block === undefined) throw bug('A tensor of the output belongs to no block', { where: planned.name });
    if (block < 0) continue;
    const layout = layouts.get(block) ?? { bytes: 0, tensors: new Map() };
    layouts.set(block, layout);
    const bytes = plannedBytes(planned);
    layout.tensors.set(planned.name, { offset: layout.bytes, bytes });
    layout.bytes += bytes;
  }
  return layouts;
}

export const blockFile = (format: string, block: number): string => `${format}-${block}.bin`;

interface Growing {
  readonly block: number;
  readonly path: string;
  readonly file: FileHandle;
  /** Tensors that are not written yet. */
  readonly left: Set<string>;
}

/** Takes the tensors of one output, block after block, each block into a file that has its name when it is complete. */
export class BlockFiles implements TensorSink {
  readonly blockByBlock = true;
  readonly #blockOf = new Map<string, number>();
  /** Begun by the first of several tensors that come at once. */
  #growing: Promise<Growing> | undefined;

  constructor(
    private readonly folder: string,
    private readonly format: string,
    private readonly layouts: ReadonlyMap<number, BlockLayout>,
  ) {
    for (const [block, { tensors }] of layouts) for (const name of tensors.keys()) this.#blockOf.set(name, block);
  }

  async write(name: string, data: ByteSource): Promise<void> {
    const block = this.#blockOf.get(name);
    const growing = await (this.#growing ??= this.#begin(block ?? -1));
    const place = this.layouts.get(growing.block)!.tensors.get(name);
    if (!place || place.bytes !== data.byteLength) {
      throw bug('A tensor is not what was planned for its block', { where: name, expected: `${place?.bytes} bytes in block ${growing.block}`, got: `${data.byteLength} bytes in block ${block}` }); // prettier-ignore
    }
    try {
      await data.writeTo(growing.file.fd, place.offset);
    } catch (error) {
      throw ioError(error, 'write', growing.path, place.bytes);
    }
    growing.left.delete(name);
  }

  /** Ends the block. */
  async flush(): Promise<void> {
    const growing = await this.#growing;
    if (!growing) return; // the block has nothing in this output
    const { block, path, file, left } = growing;
    if (left.size > 0)
      throw bug(`Tensors of block ${block} were never written`, { got: [...left].slice(0, 5).join(', ') });
    try {
      await file.sync();
    } catch (error) {
      throw ioError(error, 'flush to disk', path);
    }
    await this.#close();
    await renameDurable(path, join(this.folder, blockFile(this.format, block)));
  }

  /** Throws away what is not complete. */
  async close(): Promise<void> {
    const path = await this.#close().catch(() => undefined);
    if (path !== undefined) await rm(path, { force: true });
  }

  async #begin(block: number): Promise<Growing> {
    const layout = this.layouts.get(block);
    if (!layout) throw bug('A tensor that was not planned', { where: `${this.format}, block ${block}` });
    const path = join(this.folder, `.${blockFile(this.format, block)}.${processId()}.tmp`);
    try {
      return { block, path, file: await open(path, 'w+'), left: new Set(layout.tensors.keys()) };
    } catch (error) {
      throw ioError(error, 'make', path);
    }
  }

  /** The path of what grew. */
  async #close(): Promise<string | undefined> {
    const growing = this.#growing;
    this.#growing = undefined;
    const { file, path } = (await growing) ?? {};
    await file?.close();
    return path;
  }
}
