import { cp, mkdtemp, open, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { basename, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll } from 'vitest';
import { openDevice } from '../../src/backend/load.js';
import type { JobEnv } from '../../src/backend/env.js';
import { silentLog } from '../../src/base/log.js';
import { openModel } from '../../src/arch/open.js';

const root = fileURLToPath(new URL('../../', import.meta.url));
export const fixture = (path: string): string => join(root, 'fixtures', path);
export const shared = (path: string): string => join(root, '../shared', path);

export const dense = fixture('v1.0/v1.0_checkpoint.bin');
export const moe = fixture('moe-6m');

export function cpu(): JobEnv & { close(): void } {
  const device = openDevice({ kind: 'cpu', poison: true });
  return { device, log: silentLog, signal: new AbortController().signal, close: () => device.close() };
}

/** bf16 values of a tensor, to be changed in place. */
export type Edit = (bits: Uint16Array, shape: readonly number[]) => void;

export const toBits = (value: number): number => new Uint32Array(new Float32Array([value]).buffer)[0]! >>> 16;
export const toNumber = (bits: number): number => new Float32Array(new Uint32Array([bits << 16]).buffer)[0]!;
export const scaleBy =
  (factor: number): Edit =>
  (bits) =>
    bits.forEach((b, i) => (bits[i] = toBits(toNumber(b) * factor)));
/** As fixtures/validate/make_validate.py truncates: an error like that of 4 bits. */
export const truncate: Edit = (bits, shape) => {
  if (shape.length >= 2) bits.forEach((b, i) => (bits[i] = b & 0xffe0));
};

/** Copies of models with planted faults, in a folder that goes with `remove`. */
export class Damage {
  private constructor(readonly folder: string) {}

  static async make(): Promise<Damage> {
    return new Damage(await mkdtemp(join(tmpdir(), 'validate-')));
  }
  async remove(): Promise<void> {
    await rm(this.folder, { recursive: true, force: true });
  }

  /** A copy of a model (a folder, or a file with its sidecars) whose bf16 tensors named by `edits` are changed. */
  async copy(
    model: string,
    name: string,
    edits: Readonly<Record<string, Edit>> | Edit,
    change: (folder: string) => Promise<void> = async () => undefined,
  ): Promise<string> {
    const folder = join(this.folder, name);
    const isFile = model.endsWith('.bin');
    await cp(isFile ? join(model, '..') : model, folder, { recursive: true });
    await change(folder);
    const path = isFile ? join(folder, basename(model)) : folder;
    const opened = await openModel(path);
    try {
      const done = new Set<string>();
      const handles = new Map<string, Awaited<ReturnType<typeof open>>>();
      for (const { name: tensor, span, shape, encoding } of opened.checkpoint.tensors.values()) {
        const edit = typeof edits === 'function' ? edits : edits[tensor];
        if (!edit || encoding.kind !== 'plain' || encoding.dtype !== 'bf16') continue;
        let handle = handles.get(span.path);
        if (!handle) handles.set(span.path, (handle = await open(span.path, 'r+')));
        const bytes = new Uint8Array(span.bytes);
        await handle.read(bytes, 0, span.bytes, span.offset);
        edit(new Uint16Array(bytes.buffer), shape);
        await handle.write(bytes, 0, span.bytes, span.offset);
        done.add(tensor);
      }
      for (const handle of handles.values()) await handle.close();
      const missed = typeof edits === 'function' ? [] : Object.keys(edits).filter((key) => !done.has(key));
      if (missed.length > 0 || (typeof edits === 'function' && done.size === 0))
        throw new Error(`nothing to damage: ${missed.join(', ')}`);
    } finally {
      await opened.close();
    }
    return path;
  }
}

/** Of the file whose tests run, from its `useModels()` on. */
export let env: JobEnv & { close(): void };
export let damage: Damage;

/** Opens a device and a folder of damaged copies for all tests of a file. */
export function useModels(): void {
  beforeAll(async () => {
    env = cpu();
    damage = await Damage.make();
  });
  afterAll(async () => {
    env.close();
    await damage.remove();
  });
}
