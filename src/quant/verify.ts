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
import { dequantize } from '../tensor/ops.js';
import { Scope } from '../tensor/tensor.js';
import type { QuantPlan } from './plan.js';
import { probe } from './probe.js';

/**
 * Reopens what was written, as any reader would (headers, config, layout), dequantizes every linear, and compares the
 * values with those that were computed. Returns how many linears were compared.
 * Error: `internal` naming the linear that reads back differently; the output keeps its temporary name.
 */
export async function verifyLinears(
  folder: string,
  config: Readonly<Record<string, unknown>>,
  plan: QuantPlan,
  probes: ReadonlyMap<string, string>,
  env: JobEnv,
): Promise<number> {
  const tensors = new Map<string, TensorEntry>();
  for (const name of (await readdir(folder)).sort()) {
    if (!name.endsWith('.safetensors')) continue;
    const checkpoint = await openCheckpoint(join(folder, name), { configOptional: true });
    for (const [key, entry] of checkpoint.tensors) tensors.set(key, entry);
    await checkpoint.close();
  }
  const stored = detectLayout(config, folder)?.linears(tensors);
  const files = new OpenFiles();
  let compared = 0;
  try {
    for (const { linear, scheme, stored: shape } of plan.linears.values()) {
      if (scheme === undefined) continue;
      const found = stored?.get(`${linear.name}.weight`);
      const expected = probes.get(linear.name);
      if (found === undefined || expected === undefined) {
        throw bug('A quantized linear is missing in the output that was written', {
          where: `${folder}, ${linear.name}`,
        });
      }
      using scope = new Scope(env.device);
      const load: Load = async (entry, dtype) => {
        const tensor = scope.empty(dtype, entry.shape);
        const file = await files.get(entry.span.path);
        await env.device.readFile(tensor.buffer, tensor.byteOffset, file.fd, entry.span.offset, entry.span.bytes);
        return tensor;
      };
      const { codes, grid } = await found.read(scope, load, shape.outFeatures, shape.inFeatures);
      const got = await probe(dequantize(scope, codes, grid));
      requireSame(got, expected, `${folder}, ${linear.name}`);
      compared++;
    }
  } finally {
    await files.close();
  }
  return compared;
}

/** The same for a GGUF file: read under its Hugging Face names, blocks decoded. */
export async function verifyGguf(
  folder: string,
  plan: QuantPlan,
  probes: ReadonlyMap<string, string>,
  env: JobEnv,
): Promise<number> {
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
