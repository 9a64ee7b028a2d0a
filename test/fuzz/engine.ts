import { mkdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import v8, { GCProfiler } from 'node:v8';
import vm from 'node:vm';
import { ConvertError } from '../../src/base/errors.js';
import { Random } from '../../src/base/rng.js';
import { spoil } from './bytes.js';

/** A parser under test. */
export interface Target {
  readonly name: string;
  /** Valid inputs that everything starts from. */
  readonly seeds: readonly Buffer[];
  /** Changes an input along its structure, so that it is not refused by its first check already. */
  readonly reshape: (random: Random, input: Buffer) => Buffer;
  /** Reads an input; what it returns stands for what was found in it. Refuses by a ConvertError of kind 'input'. */
  readonly read: (input: Buffer) => unknown;
}

export interface Outcome {
  readonly inputs: number;
  /** Inputs that were read, not refused. */
  readonly accepted: number;
  /** Different refusals and results: how far into the parser the inputs came. */
  readonly kinds: number;
  /** Longest time of one input, ms, pauses of the machine included. */
  readonly slowest: number;
}

const limits = { milliseconds: 1000, bytes: 64 * 2 ** 20, pool: 600, inputBytes: 2 ** 19 };
/** More inputs (npm run fuzz), another seed. */
export const times = Number(process.env.FUZZ_TIMES ?? 1);
const firstSeed = Number(process.env.FUZZ_SEED ?? 1);

/**
 * Reads `count` inputs, each made from one before: changed along the format's structure, byte by byte, or both. An input
 * that ends in a way not seen before becomes a start for others. Throws for an input that ends otherwise than in a
 * result or a refusal, takes a second, or takes 64 MiB; the input is kept in build/fuzz.
 */
export async function fuzz(target: Target, count: number): Promise<Outcome> {
  const random = new Random(firstSeed, target.name.length);
  const pool = [...target.seeds];
  const kinds = new Set<string>();
  let [accepted, slowest] = [0, 0];
  for (const seed of target.seeds) {
    const { kind, ok } = await attempt(target, seed);
    if (!ok) throw new Error(`${target.name}: a seed is refused: ${kind}`);
    kinds.add(kind);
  }
  const inputs = Math.ceil(count * times);
  for (let i = 0; i < inputs; i++) {
    const start = pool[random.below(2) === 0 ? random.below(target.seeds.length) : random.below(pool.length)]!;
    let input = start;
    const way = random.below(10);
    for (let n = way < 8 ? few(random) : 0; n > 0; n--) input = target.reshape(random, input);
    for (let n = way >= 7 ? few(random) : 0; n > 0; n--) input = spoil(random, input, target.seeds);
    if (input.length > limits.inputBytes) input = input.subarray(0, limits.inputBytes);
    const result = await attempt(target, input);
    if (result.milliseconds > limits.milliseconds / 4 || result.bytes > limits.bytes / 4) {
      await measureAgain(target, input, i);
    }
    if (result.ok) accepted++;
    slowest = Math.max(slowest, result.milliseconds);
    if (!kinds.has(result.kind)) {
      kinds.add(result.kind);
      if (input.length < 16_384) {
        if (pool.length < limits.pool) pool.push(input);
        else pool[target.seeds.length + random.below(pool.length - target.seeds.length)] = input;
      }
    }
  }
  return { inputs, accepted, kinds: kinds.size, slowest };
}

/** Mostly one: two changes seldom leave a valid input. */
const few = (random: Random): number => (random.below(3) > 0 ? 1 : 1 + random.below(4));

interface Attempt {
  readonly ok: boolean;
  readonly kind: string;
  readonly milliseconds: number;
  readonly bytes: number;
}

async function attempt(target: Target, input: Buffer): Promise<Attempt> {
  const before = memory();
  const started = performance.now();
  let [ok, kind] = [true, ''];
  try {
    const result = target.read(input);
    kind = signature(result instanceof Promise ? await result : result);
  } catch (error) {
    ok = false;
    if (!(error instanceof ConvertError) || error.kind !== 'input') {
      throw failed(target, input, error instanceof Error ? (error.stack ?? error.message) : String(error));
    }
    kind = error.message
      .replace(/"(?:[^"\\]|\\.)*"/g, '""')
      .replace(/[0-9a-f]*\d[0-9a-f]*/g, '0')
      .slice(0, 160);
  }
  return { ok, kind, milliseconds: performance.now() - started, bytes: memory() - before };
}

/** What was found, coarsely: sizes count by their powers of two. */
const signature = (result: unknown): string =>
  JSON.stringify(result, (_, value: unknown) =>
    typeof value === 'number' ? Math.ceil(Math.log2(Math.abs(value) + 1)) : typeof value === 'bigint' ? 64 : value,
  ).slice(0, 400);

function memory(): number {
  const { used_heap_size: heap, external_memory: external } = v8.getHeapStatistics();
  return heap + external;
}

v8.setFlagsFromString('--expose-gc');
const collect = vm.runInNewContext('gc') as () => void;

/** One input by itself from a clean heap: the collector's own record tells how much was in use at most. */
async function measureAgain(target: Target, input: Buffer, index: number): Promise<void> {
  let [least, bytes] = [Infinity, 0];
  for (let i = 0; i < 3; i++) {
    collect();
    const before = memory();
    const profiler = new GCProfiler();
    profiler.start();
    const started = process.cpuUsage();
    await attempt(target, input);
    const { user, system } = process.cpuUsage(started);
    let peak = memory();
    for (const { beforeGC } of profiler.stop()?.statistics ?? []) {
      const { usedHeapSize, externalMemory } = beforeGC.heapStatistics;
      peak = Math.max(peak, usedHeapSize + externalMemory);
    }
    [least, bytes] = [Math.min(least, (user + system) / 1000), peak - before];
    if (least < limits.milliseconds && bytes < limits.bytes) return;
  }
  throw failed(target, input, `input ${index} takes ${Math.round(least)} ms and ${Math.round(bytes / 2 ** 20)} MiB`);
}

/** What holds of everything that a parser lets through. */
export function must(holds: boolean, name: string, what: string): void {
  if (!holds) throw new Error(`let through with a wrong ${what}: ${name.slice(0, 200)}`);
}

function failed(target: Target, input: Buffer, what: string): Error {
  const folder = 'build/fuzz';
  mkdirSync(folder, { recursive: true });
  const path = join(folder, `${target.name.replaceAll(/\W+/g, '-')}.bin`);
  writeFileSync(path, input);
  return new Error(`${target.name}: ${what}\nThe input is in ${path}, ${input.length} bytes.`);
}
