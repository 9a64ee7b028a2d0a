import { readdir } from 'node:fs/promises';
import { join } from 'node:path';
import { bug } from '../base/errors.js';
import type { JobEnv } from '../backend/env.js';
import { OpenFiles } from '../arch/files.js';
import { openModel } from '../arch/open.js';
import { WeightReader } from '../arch/weights.js';
import { openCheckpoint } from '../checkpoint/open.js';
import type { TensorEntry } from '../checkpoint/types.js';
import { detectLayout } from '../layout/detect.js';
import type { Load } from '../layout/types.js';
import { cast, dequantize } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { QuantPlan } from './plan.js';
import { probe } from './probe.js';

/** Hashes of what was computed, by linear. */
export type Probes = ReadonlyMap<string, string>;

/**
 * Reopens what was written, as any reader would (headers, config, layout), dequantizes every linear, and compares the
 * values with those that were computed. Returns how many linears were compared.
 * Error: `internal` naming the linear that reads back differently; the output keeps its temporary name.
 */
export async function verifyFolder(
  folder: string,
  config: Readonly<Record<string, unknown>>,
  plan: QuantPlan,
  probes: Probes,
  env: JobEnv,
): Promise<number> {
  const written = await writtenTensors(folder, config);
  const stored = detectLayout(written.config, folder)?.linears(written.tensors);
  return await compareAll(plan, probes, folder, env, async (name, [n, k], scope, load) => {
    const found = stored?.get(`${name}.weight`);
    if (found === undefined) return undefined;
    const { codes, grid } = await found.read(scope, load, n, k);
    return dequantize(scope, codes, grid);
  });
}

/** The same for plain weights. */
export async function verifyPlain(folder: string, plan: QuantPlan, probes: Probes, env: JobEnv): Promise<number> {
  const { tensors } = await writtenTensors(folder, {});
  return await compareAll(plan, probes, folder, env, async (name, _shape, scope, load) => {
    const entry = tensors.get(`${name}.weight`);
    if (entry?.encoding.kind !== 'plain') return undefined;
    return cast(scope, await load(entry, entry.encoding.dtype), 'f32');
  });
}

/** What lies in the files. config.json is written last of all, so an ONNX graph or the plan says what the codes are. */
async function writtenTensors(folder: string, config: Readonly<Record<string, unknown>>) {
  const tensors = new Map<string, TensorEntry>();
  let own = config;
  for (const name of (await readdir(folder)).sort()) {
    if (!/\.(safetensors|onnx)$/.test(name)) continue;
    const checkpoint = await openCheckpoint(join(folder, name), { configOptional: true });
    for (const [key, entry] of checkpoint.tensors) tensors.set(key, entry);
    if (name.endsWith('.onnx')) own = checkpoint.config;
    await checkpoint.close();
  }
  return { tensors, config: own };
}

/** f32 [N, K] of a linear as it was written; undefined: it is not there. */
type ReadValues = (
  name: string,
  shape: readonly [n: number, k: number],
  scope: Scope,
  load: Load,
) => Promise<Tensor | undefined>;

async function compareAll(
  plan: QuantPlan,
  probes: Probes,
  folder: string,
  env: JobEnv,
  read: ReadValues,
): Promise<number> {
  const files = new OpenFiles();
  const planned = [...plan.linears.values()].filter(({ scheme }) => scheme !== undefined);
  const next = planned.values();
  const lane = async (): Promise<void> => {
    for (const { linear, stored: shape } of next) {
      const where = `${folder}, ${linear.name}`;
      using scope = new Scope(env.device);
      const load: Load = async (entry, dtype) => {
        const tensor = scope.empty(dtype, entry.shape);
        const file = await files.get(entry.span.path);
        await env.device.readFile(tensor.buffer, tensor.byteOffset, file.fd, entry.span.offset, entry.span.bytes);
        return tensor;
      };
      const values = await read(linear.name, [shape.outFeatures, shape.inFeatures], scope, load);
      const expected = probes.get(linear.name);
      if (values === undefined || expected === undefined) {
        throw bug('A quantized linear is missing in the output that was written', { where });
      }
      requireSame(await probe(values), expected, where);
    }
  };
  try {
    // A GPU waits for the files: several linears at once. All end before an error is thrown.
    const lanes = Array.from({ length: env.device.kind === 'cpu' ? 1 : 4 }, lane);
    await Promise.allSettled(lanes);
    await Promise.all(lanes);
  } finally {
    await files.close();
  }
  return planned.length;
}

/** The same for a GGUF file: read under its Hugging Face names, blocks decoded. */
export async function verifyGguf(folder: string, plan: QuantPlan, probes: Probes, env: JobEnv): Promise<number> {
  const names = (await readdir(folder)).filter((name) => name.endsWith('.gguf'));
  let compared = 0;
  const open = await openModel(join(folder, names[0]!));
  try {
    const reader = new WeightReader(open, env.device, 'f32');
    for (const { linear, scheme } of plan.linears.values()) {
      if (scheme === undefined) continue;
      const where = `${folder}, ${linear.name}`;
      const expected = probes.get(linear.name);
      if (expected === undefined) throw bug('A quantized linear was never computed', { where });
      using scope = new Scope(env.device);
      const values = await reader.tensor(`${linear.name}.weight`, scope, 'f32');
      requireSame(await probe(values), expected, where);
      compared++;
    }
  } finally {
    await open.close();
  }
  return compared;
}

function requireSame(got: string, expected: string, where: string): void {
  if (got === expected) return;
  throw bug('A quantized linear reads back differently from what was computed', {
    where,
    expected,
    got,
    hint: 'The disk may be failing; run the same command with --restart. If it happens again, please report it.',
  });
}
