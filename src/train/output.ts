import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { badInput, bug } from '../base/errors.js';
import { fileSource } from '../base/io.js';
import type { Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import { OpenFiles } from '../arch/files.js';
import type { OpenModel } from '../arch/open.js';
import { openCheckpoint } from '../checkpoint/open.js';
import type { CheckpointWriter, PlannedTensor, TensorEntry } from '../checkpoint/types.js';
import { detectLayout, layoutWriters } from '../layout/detect.js';
import { cast, dequantize } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Codes } from '../tune/weights.js';
import { probe } from '../quant/probe.js';

/** The tensors of a checkpoint as they are stored, to be written again under the same names. */
export function sameTensors(open: OpenModel): PlannedTensor[] {
  return [...open.checkpoint.tensors.values()].map(({ name, shape, encoding, span, strides }) => {
    if (encoding.kind === 'plain' && !strides) return { name, shape, dtype: encoding.dtype };
    throw badInput('A tensor is stored in a way that training cannot write', {
      where: `${span.path}, tensor ${name}`,
      got: encoding.kind,
      hint: 'Bring the checkpoint to plain tensors first: deepseek-convert convert.',
    });
  });
}

/** Writes everything that did not learn. */
export async function writeRest(
  open: OpenModel,
  writer: CheckpointWriter,
  learned: ReadonlySet<string>,
): Promise<void> {
  for (const entry of open.checkpoint.tensors.values()) {
    if (!learned.has(entry.name) && !writer.has(entry.name)) await writer.write(entry.name, fileSource(entry.span));
  }
}

/** The stored tensors of linears that learned, and what each linear must read back as. */
export async function writeCodes(
  open: OpenModel,
  writer: CheckpointWriter,
  codes: Codes,
): Promise<Map<string, string>> {
  const device = codes.codes.device;
  const probes = new Map<string, string>();
  const n = codes.codes.dim(0) / codes.names.length;
  for (const [e, name] of codes.names.entries()) {
    using scope = new Scope(device);
    const { linear } = open.tensors.get(name)!;
    const rows = (x: Tensor) => x.slice(0, e * n, (e + 1) * n);
    const grid = { ...codes.grid, scale: rows(codes.grid.scale), zero: codes.grid.zero && rows(codes.grid.zero) };
    const values = { codes: rows(codes.codes), grid };
    const shape = { name: name.replace(/\.weight$/, ''), outFeatures: n, inFeatures: codes.codes.dim(1) };
    if (!linear?.scheme) throw bug(`${name} has no scheme of a layout`);
    const stored = layoutWriters['compressed-tensors'].store(scope, shape, linear.scheme, values, codes.stored);
    for (const tensor of stored) await writer.write(tensor.name, tensor.tensor.source());
    probes.set(name, await probe(dequantize(scope, values.codes, grid)));
  }
  return probes;
}

/** Names of the tensors that hold quantized linears. */
export const storedNames = (open: OpenModel, linears: Iterable<string>): string[] =>
  [...linears].flatMap((name) => open.tensors.get(name)!.sources);

/** Writes a tensor that learned in full precision under its own name and in its own type. */
export async function writeValue(
  open: OpenModel,
  writer: CheckpointWriter,
  names: readonly string[],
  value: Tensor,
): Promise<void> {
  const n = value.count / names.length;
  for (const [i, name] of names.entries()) {
    using scope = new Scope(value.device);
    const { entry, sources } = open.tensors.get(name)!;
    if (sources[0] !== name || entry.encoding.kind !== 'plain') {
      throw badInput('A weight is stored together with others', {
        where: `${entry.span.path}, tensor ${sources[0]}`,
        hint: 'Bring the checkpoint to plain tensors first: deepseek-convert convert.',
      });
    }
    const part = value.view(-1).slice(0, i * n, (i + 1) * n);
    await writer.write(name, cast(scope, part, entry.encoding.dtype).source());
  }
}

/** Reads quantized linears back from the output's files as any reader would, and compares. Returns how many. */
export async function verifyCodes(
  folder: string,
  config: Readonly<Record<string, unknown>>,
  probes: ReadonlyMap<string, string>,
  shapeOf: (name: string) => readonly [number, number],
  env: JobEnv,
): Promise<number> {
  const tensors = new Map<string, TensorEntry>();
  for (const name of (await readdir(folder)).sort()) {
    if (!name.endsWith('.safetensors')) continue;
    const checkpoint = await openCheckpoint(join(folder, name), { configOptional: true });
    for (const [key, entry] of checkpoint.tensors) tensors.set(key, entry);
    await checkpoint.close();
  }
  const linears = detectLayout(config, folder)?.linears(tensors);
  const files = new OpenFiles();
  try {
    for (const [name, expected] of probes) {
      using scope = new Scope(env.device);
      const load = async (entry: TensorEntry, dtype: PlannedTensor['dtype']): Promise<Tensor> => {
        const tensor = scope.empty(dtype, entry.shape);
        const file = await files.get(entry.span.path);
        await env.device.readFile(tensor.buffer, 0, file.fd, entry.span.offset, entry.span.bytes);
        return tensor;
      };
      const found = linears?.get(name);
      const read = found && (await found.read(scope, load, ...shapeOf(name)));
      const got = read && (await probe(dequantize(scope, read.codes, read.grid)));
      if (got === expected) continue;
      throw bug('A trained linear reads back differently from what was computed', {
        where: `${folder}, ${name}`,
        expected,
        got: got ?? 'nothing',
        hint: 'The disk may be failing; run the same command with --restart. If it happens again, please report it.',
      });
    }
  } finally {
    await files.close();
  }
  return probes.size;
}

export const asJson = (value: unknown): Json => JSON.parse(JSON.stringify(value)) as Json;
