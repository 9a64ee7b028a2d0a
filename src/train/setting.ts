import { badInput, badUsage, ConvertError } from '../base/errors.js';
import type { Device } from '../backend/device.js';
import type { JobEnv } from '../backend/env.js';
import type { CalibrationSet } from '../arch/calibration.js';
import type { OpenModel } from '../arch/open.js';
import type { Model } from '../arch/types.js';
import { WeightReader } from '../arch/weights.js';
import { Scope } from '../tensor/tensor.js';
import { recordedBytes } from '../tune/block.js';
import type { Alarm } from '../tune/health.js';
import type { Teacher } from './pass.js';

/** How many windows judge instead of being trained on. Error: too little text for that. */
export function heldOf({ n, seqLen }: CalibrationSet): number {
  if (n >= 4) return Math.max(1, Math.floor(n / 16));
  throw badInput('There is too little text to train on', {
    got: `${n} windows of ${seqLen} tokens`,
    expected: 'at least 4, of which one judges',
    hint: 'Give more text (--calibration), or shorter windows (--seq-len).',
  });
}

/** Sequences that go through a model at once. */
export const sequencesOf = ({ device }: JobEnv, { seqLen }: CalibrationSet): number =>
  Math.max(1, Math.floor((device.kind === 'cpu' ? 2048 : 16384) / seqLen));

/** Devices that train side by side. */
export const devicesOf = ({ device, group }: JobEnv): readonly Device[] => group?.devices ?? [device];

/** Sequences that one device takes through a model at once, of the `batch` of a step. */
export const microBatchOf = (env: JobEnv, set: CalibrationSet, batch: number): number =>
  Math.min(batch / devicesOf(env).length, sequencesOf(env, set));

/** Error: the windows of a step do not divide among the devices. */
export function requireShares(env: JobEnv, batch: number): void {
  const devices = devicesOf(env).length;
  if (batch % devices === 0) return;
  throw badUsage('The windows of a step do not divide among the devices', {
    got: `--batch ${batch} on ${devices} devices`,
    expected: `a multiple of ${devices}`,
  });
}

/**
 * What the devices behind the first hold of a job: `make` for each of them, all at the same time, in a scope on that
 * device which ends with the result.
 */
export async function onOthers<T>(
  env: JobEnv,
  make: (env: JobEnv, scope: Scope) => Promise<T>,
): Promise<Disposable & { readonly all: readonly T[] }> {
  const scopes = devicesOf(env).slice(1).map((device) => new Scope(device)); // prettier-ignore
  const dispose = () => scopes.forEach((scope) => scope[Symbol.dispose]());
  const ends = await Promise.allSettled(scopes.map((scope) => make({ ...env, device: scope.device }, scope)));
  const all: T[] = [];
  for (const end of ends) {
    if (end.status === 'fulfilled') {
      all.push(end.value);
      continue;
    }
    dispose();
    throw end.reason;
  }
  return { all, [Symbol.dispose]: dispose };
}

/** Whether activations of a pass over so many tokens would take too much memory to be kept. */
export function mustRecompute({ device }: JobEnv, { blocks }: Model, dtype: 'f32' | 'bf16', tokens: number): boolean {
  const bytes = tokens * blocks.reduce((sum, block) => sum + recordedBytes(block, dtype), 0);
  return bytes > 0.3 * device.available();
}

/** A model with its weights on the device. */
export async function loadTeacher(
  open: OpenModel,
  { device }: JobEnv,
  dtype: 'f32' | 'bf16',
  scope: Scope,
): Promise<Teacher> {
  const reader = new WeightReader(open, device, dtype);
  const blocks = [];
  for (let i = 0; i < open.model.blocks.length; i++) blocks.push(await reader.block(i, scope));
  return { model: open.model, outer: await reader.outer(scope), blocks };
}

export type AlarmWatch = (where: string, alarm: Alarm) => void;

/** Says alarms aloud, or ends the run at the first. `rates`: the options that set learning rates. */
export function alarmWatch({ log }: JobEnv, fail: boolean, rates: string): AlarmWatch {
  return (where, { step, text, kind }) => {
    if (!fail) {
      log.warn(`Gradient alarm (${kind}) in ${where}, step ${step}: ${text}`);
      return;
    }
    throw new ConvertError('gate', `Gradient alarm: ${kind}`, {
      where: `${where}, step ${step}`,
      got: text,
      hint:
        kind === 'vanishing'
          ? 'That block hardly learns: look at its weights (validate, inspect). Without --fail-on-gradient-alarm the run goes on.'
          : `Lower ${rates}, or train on more text a step (--batch). Without --fail-on-gradient-alarm the run goes on, and keeps the best it has seen.`,
    });
  };
}
