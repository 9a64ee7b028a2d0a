import { badUsage } from '../base/errors.js';
import type { FloatDType } from '../base/dtype.js';
import type { Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import { isFileOutput } from '../checkpoint/writer.js';
import { calibrationTokens, type CalibrationSet } from '../arch/calibration.js';
import { openModel, type OpenModel } from '../arch/open.js';
import { rotated } from '../arch/rotate.js';
import { checkEmitted } from '../targets/deploy/emit.js';
import { checkFormats, holderOf, planTarget, requireOneScheme, type PlannedTarget } from './formats.js';
import { sampledDigest } from './input.js';
import type { QuantizeOptions, QuantizePreview } from './options.js';
import { makePlan } from './plan.js';
import { checkRecipe, type Recipe, type SchemeChange } from './scheme.js';
import { defaultScope } from './select.js';
import { requireShares } from './shares.js';
import { requireTrainable } from '../tune/trainable.js';

/** A job decided from headers, with the model open. */
export interface Prepared extends QuantizePreview {
  readonly open: OpenModel;
  readonly targets: readonly PlannedTarget[];
  readonly recipe: Recipe;
  readonly scope: string;
  /** Tells inputs of the same shape apart. */
  readonly weights: string;
}

/** Checks options and plans every output. The caller closes `open`. */
export async function prepare(options: QuantizeOptions): Promise<Prepared> {
  const { input, formats, config } = options;
  checkRecipe(options.recipe);
  checkFormats(formats, options.out, options.recipe);
  checkEmitted(options.emit ?? [], formats, isFileOutput(options.out));
  requireFoldable(options);
  requireRotatable(options);
  // Block types decide the codes where GGUF is the only output; beside others, it follows their codes.
  const alone = formats.length === 1 && formats[0] === 'gguf';
  const { blocks, mixture, ...common } = options.recipe;
  const recipe: Recipe = alone ? { ...common, blocks: blocks ?? 'q4_k', ...(mixture && { mixture }) } : common;
  let open = await openModel(input, { config });
  try {
    if (recipe.rotation) open = await rotated(open, recipe.rotation.seed);
    if (recipe.method === 'autoround') requireTrainable(open);
    const scope = options.scope ?? defaultScope(open.model.modelType);
    const weights = await sampledDigest(open.checkpoint.files);
    return await planAll(options, { open, recipe, scope, weights });
  } catch (error) {
    await open.close();
    throw error;
  }
}

/** The plan of the codes and of every output; `chosen`: bits by measured sensitivity. */
export async function planAll(
  options: QuantizeOptions,
  { open, recipe, scope, weights }: Pick<Prepared, 'open' | 'recipe' | 'scope' | 'weights'>,
  chosen?: ReadonlyMap<string, SchemeChange>,
): Promise<Prepared> {
  const { formats, keep = [] } = options;
  const selection = { scope, keep };
  const alone = recipe.blocks !== undefined;
  const plan = makePlan(open.model, open.checkpoint, recipe, selection, holderOf(formats), chosen);
  requireOneScheme(formats, plan);
  requireShares(plan, open.model, formats, options.tensorParallel ?? []);
  const targets: PlannedTarget[] = [];
  for (const format of formats) targets.push(await planTarget(format, open, plan, options.recipe, selection, alone));
  const inputBytes = [...open.checkpoint.tensors.values()].reduce((sum, { span }) => sum + span.bytes, 0);
  const outputs = targets.map(({ output }) => output);
  return {
    ...{ open, model: open.model, targets, recipe, scope, weights, plan, inputBytes },
    output: {
      tensors: outputs.flatMap(({ tensors }) => tensors),
      through: outputs[0]!.through,
      bytes: outputs.reduce((sum, { bytes }) => sum + bytes, 0),
    },
    notices: [...open.notes, ...plan.notes, ...targets.flatMap(({ notes }) => notes), ...later(recipe, chosen)],
  };
}

const later = ({ targetBpw }: Recipe, chosen: unknown): string[] =>
  targetBpw === undefined || chosen !== undefined
    ? []
    : [`Bits are chosen from measured sensitivities when the job runs: ${targetBpw} a weight on average.`];

/** Containers that name and arrange norms in their own way cannot take up scales. */
function requireFoldable({ recipe: { method }, formats }: QuantizeOptions): void {
  const other = formats.find((format) => format === 'gguf' || format === 'onnx');
  if (other === undefined || !method.startsWith('awq')) return;
  throw badUsage(`--method ${method} does not go together with --format ${other}`, {
    expected: 'compressed-tensors, gptq, awq or safetensors',
    hint: 'Use --method gptq, which is better, or convert the result of --format safetensors.',
  });
}

/** What a rotation is at odds with, whatever the architecture. */
function requireRotatable({ recipe: { rotation, method }, formats, states }: QuantizeOptions): void {
  if (rotation === undefined) return;
  if (method.startsWith('awq')) {
    throw badUsage(`--rotate does not go together with --method ${method}`, {
      expected: 'gptq, rtn or autoround',
      hint: 'Scales of channels have nothing left to scale once outliers are spread over all of them.',
    });
  }
  if (formats.includes('imatrix')) {
    throw badUsage('--rotate does not go together with --format imatrix', {
      hint: 'The statistics would be those of the rotated weights, which the importance matrix’s model does not have.',
    });
  }
  if (states === 'bf16') {
    throw badUsage('--rotate does not go together with --states bf16', {
      hint: 'Rotated weights stay in fp32 until they are quantized.',
    });
  }
}

/** The plan alone: what becomes of each tensor, sizes. Reads headers only. */
export async function previewQuantize(options: QuantizeOptions): Promise<QuantizePreview> {
  const { open, ...preview } = await prepare(options);
  await open.close();
  return preview;
}

/** The tokens that options ask for; undefined: none are needed. */
export async function calibrate(
  { calibration, recipe }: QuantizeOptions,
  { open }: Prepared,
  env: JobEnv,
): Promise<CalibrationSet | undefined> {
  if (calibration === undefined) {
    if (recipe.method === 'rtn') return undefined;
    throw badUsage(`--method ${recipe.method} needs calibration text`);
  }
  const seqLen = calibration.seqLen ?? Math.min(2048, open.model.context);
  const set = await calibrationTokens(open, { ...calibration, seqLen }, env);
  for (const notice of set.notices) env.log.warn(notice);
  env.log.info(`Calibration: ${set.description}`);
  return set;
}

/** Everything that decides the output's bytes. */
export function fingerprint(
  options: QuantizeOptions,
  prepared: Prepared,
  set: CalibrationSet | undefined,
  env: JobEnv,
): Record<string, Json> {
  const { open, recipe, scope, weights } = prepared;
  return {
    command: 'quantize',
    tool: options.tool.version,
    input: open.checkpoint.fingerprint,
    weights,
    recipe: JSON.parse(JSON.stringify(recipe)) as Json,
    selection: { scope, keep: options.keep ?? [] },
    allExperts: options.calibrateAllExperts ?? false,
    ...(options.independentBlocks && set && { independentBlocks: true }),
    formats: [...options.formats],
    ...(options.formats.length > 1 && { blocks: options.recipe.mixture ?? options.recipe.blocks ?? null }),
    calibration: set === undefined ? null : { text: set.hash, description: set.description },
    computing: {
      device: env.device.kind,
      states: statesOf(options, prepared, env),
      batchRows: options.batchRows ?? null,
    },
    shardSize: options.shardSize ?? null,
  };
}

/** Default: bf16 (f32 for models of other types on the CPU): what rounding a state adds is lost in what INT4 adds. */
export function statesOf(
  { states, recipe }: Pick<QuantizeOptions, 'states' | 'recipe'>,
  { plan }: Pick<QuantizePreview, 'plan'>,
  { device }: Pick<JobEnv, 'device'>,
): 'f32' | 'bf16' {
  if (states !== undefined) return states;
  // Rotated weights are read in it: nothing may round them before they are quantized.
  if (recipe.rotation) return 'f32';
  // Backward passes, as all training, are in fp32 there.
  if (device.kind === 'cpu' && recipe.method === 'autoround') return 'f32';
  const exact = device.kind === 'cpu' && [...plan.linears.values()].some(({ dtype }) => dtype !== 'bf16');
  return exact ? 'f32' : 'bf16';
}

/** In which precision the output holds a tensor that is not quantized. */
export function plannedDTypes({ output }: Prepared): (name: string) => FloatDType {
  const types = new Map(output.tensors.map(({ planned }) => [planned.name, planned.dtype]));
  return (name) => (types.get(name) ?? 'bf16') as FloatDType;
}
