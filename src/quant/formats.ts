import { badInput, badUsage } from '../base/errors.js';
import type { FloatDType } from '../base/dtype.js';
import type { JobEnv } from '../backend/env.js';
import type { OpenModel } from '../arch/open.js';
import type { WeightReader } from '../arch/weights.js';
import { isFileOutput } from '../checkpoint/writer.js';
import type { WriterOptions } from '../checkpoint/writer.js';
import { layoutWriters } from '../layout/detect.js';
import { matMulNBitsWriter } from '../layout/matmulnbits-writer.js';
import type { LinearShape } from '../layout/types.js';
import { refuseInGguf } from './blocks.js';
import { planGgufOutput } from './gguf.js';
import { planImatrix, verifyImatrix } from './imatrix.js';
import { OnnxTarget, planOnnx } from './onnx.js';
import { planOutput, type OutputPlan } from './output.js';
import { makePlan, type Holder, type QuantPlan } from './plan.js';
import type { Recipe, Scheme, StoredScales } from './scheme.js';
import type { Selection } from './select.js';
import { layoutTarget, plainTarget, type Target } from './target.js';
import { verifyFolder, verifyGguf, verifyPlain, type Probes } from './verify.js';

/**
 * What `quantize` writes. `safetensors`: plain weights, as the codes say them. `imatrix`: no model, but the statistics
 * for llama.cpp's quantizer.
 */
export const quantFormats = ['compressed-tensors', 'gptq', 'awq', 'gguf', 'onnx', 'safetensors', 'imatrix'] as const;
export type QuantFormat = (typeof quantFormats)[number];

/** One output of a job, decided from headers. */
export interface PlannedTarget {
  readonly format: QuantFormat;
  /** What becomes of the linears in it. */
  readonly plan: QuantPlan;
  readonly output: OutputPlan;
  /** What the checkpoint writer needs beside tensors and provenance. */
  readonly writing: Pick<WriterOptions, 'format' | 'config' | 'gguf' | 'onnx'> & {
    readonly extraFiles: ReadonlyMap<string, string>;
  };
  readonly notes: readonly string[];
  open(reader: WeightReader, env: JobEnv): Target;
  /** Reopens what was written and compares it with what was computed: how many linears. */
  verify(folder: string, probes: Probes, env: JobEnv): Promise<number>;
}

/** Refuses what the formats together cannot be, before anything is read. */
export function checkFormats(formats: readonly QuantFormat[], out: string, { bits }: Recipe): void {
  const [first] = formats;
  const twice = formats.find((format, i) => formats.indexOf(format) !== i);
  if (first === undefined || twice !== undefined) {
    throw badUsage(twice === undefined ? '--format is missing' : `--format names ${twice} twice`);
  }
  const isFile = isFileOutput(out);
  if (isFile && (formats.length > 1 || first !== 'gguf')) {
    throw badUsage(formats.length > 1 ? 'Several outputs are folders in one folder' : 'A quantized model is a folder', {
      got: out,
      expected: 'a folder name for -o, without an extension such as .bin',
    });
  }
  if (isFile && !out.endsWith('.gguf')) {
    throw badUsage('The output is a GGUF file', { got: out, expected: 'a name that ends in .gguf, or a folder' });
  }
  if (formats.includes('awq') && bits !== 4) throw badUsage('AWQ stores 4 bits', { got: `--bits ${bits}` });
}

/** What all of the formats can hold: the first reason against counts. */
export function holderOf(formats: readonly QuantFormat[]): Holder {
  return {
    refuse: (linear: LinearShape, scheme: Scheme) => {
      for (const format of formats) {
        const reason = refusal(format, linear, scheme);
        if (reason !== undefined) return reason;
      }
      return undefined;
    },
  };
}

function refusal(format: QuantFormat, linear: LinearShape, scheme: Scheme): string | undefined {
  switch (format) {
    case 'gguf':
      return scheme.blocks === undefined ? undefined : refuseInGguf(linear);
    case 'onnx':
      return matMulNBitsWriter.refuse(linear, scheme);
    case 'safetensors':
    case 'imatrix':
      return undefined;
    default:
      return layoutWriters[format].refuse(linear, scheme);
  }
}

/** Layouts whose settings hold for all linears alike. */
const oneScheme: readonly QuantFormat[] = ['gptq', 'awq'];

/** Errors: several schemes in a layout that knows one. */
export function requireOneScheme(formats: readonly QuantFormat[], { use }: QuantPlan): void {
  const format = formats.find((one) => oneScheme.includes(one));
  if (format === undefined || use.groups.length < 2) return;
  const [rule, other] = use.groups;
  throw badInput(`${format} has one scheme for all linears`, {
    where: other!.linears[0]!,
    expected: `groups of ${rule!.scheme.group}, ${rule!.scheme.bits} bits`,
    got: `groups of ${other!.scheme.group}, ${other!.scheme.bits} bits`,
    hint: 'Choose a --group-size that divides every width, leave those linears out with --keep, or use --format compressed-tensors.',
  });
}

/** Every precision that scales are stored in: what they are rounded to, so that all outputs hold the same weights. */
export const storedScales =
  (formats: readonly QuantFormat[]) =>
  (dtype: FloatDType): StoredScales => {
    const types: Record<QuantFormat, FloatDType> = {
      'compressed-tensors': dtype,
      ...{
        gptq: 'f16',
        awq: 'f16',
        gguf: formats.length > 1 ? 'f16' : 'f32',
        onnx: 'f32',
        safetensors: 'f32',
        imatrix: 'f32',
      },
    };
    return [...new Set(formats.map((format) => types[format]))];
  };

/** Decides what one output holds. `plan`: of the codes; GGUF beside others has a plan of its own types. */
export async function planTarget(
  format: QuantFormat,
  open: OpenModel,
  plan: QuantPlan,
  recipe: Recipe,
  selection: Selection,
  alone: boolean,
): Promise<PlannedTarget> {
  const { quantization_config: _q, compression_config: _c, ...config } = open.checkpoint.config;
  const common = { format, plan, notes: [] };
  const plainConfig = { ...config, ...plan.config };
  switch (format) {
    case 'gguf': {
      const blocks = alone ? plan : ggufPlan(open, plan, recipe, selection);
      const file = await planGgufOutput(open, blocks, recipe);
      return {
        ...{ ...common, plan: blocks, output: file.plan, notes: file.notes },
        writing: { format: 'gguf', gguf: file.metadata, config: plainConfig, extraFiles: new Map() },
        open: (_reader, env) => file.target(env),
        verify: (folder, probes, env) => verifyGguf(folder, blocks, probes, env),
      };
    }
    case 'onnx': {
      const { plan: output, graph, extraFiles, notes } = planOnnx(open, plan);
      const { torch_dtype: _t, ...rest } = plainConfig as Record<string, unknown>;
      return {
        ...{ ...common, output, notes },
        writing: { format: 'onnx', onnx: graph, config: { ...rest, dtype: 'float32' }, extraFiles },
        open: (reader, env) => new OnnxTarget(output, reader, env),
        verify: (folder, probes, env) => verifyFolder(folder, {}, plan, probes, env),
      };
    }
    case 'imatrix': {
      const imatrix = await planImatrix(open, plan);
      const output = imatrix.plan;
      return {
        ...{ ...common, output },
        writing: { format: 'gguf', gguf: imatrix.metadata, config: plainConfig, extraFiles: new Map() },
        open: () => imatrix.target(),
        verify: (folder) => verifyImatrix(folder),
      };
    }
    case 'safetensors': {
      const output = planOutput(open, plan, ({ name, inFeatures, outFeatures }, _scheme, dtype) => [
        { name: `${name}.weight`, shape: [outFeatures, inFeatures], dtype },
      ]);
      return {
        ...{ ...common, output },
        writing: { format: 'safetensors', config: plainConfig, extraFiles: new Map() },
        open: (reader, env) => plainTarget(output, reader, env),
        verify: (folder, probes, env) => verifyPlain(folder, plan, probes, env),
      };
    }
    default: {
      const layout = layoutWriters[format];
      const output = planOutput(open, plan, (linear, scheme, dtype) => layout.plan(linear, scheme, dtype));
      const own = { ...plainConfig, quantization_config: layout.config(plan.use) };
      return {
        ...{ ...common, output },
        writing: { format: 'safetensors', config: own, extraFiles: new Map() },
        open: (reader, env) => layoutTarget(layout, output, reader, env),
        verify: (folder, probes, env) => verifyFolder(folder, own, plan, probes, env),
      };
    }
  }
}

/** Block types for the linears that the other outputs quantize; the others stay as they are there too. */
function ggufPlan(open: OpenModel, plan: QuantPlan, recipe: Recipe, selection: Selection): QuantPlan {
  const kept = [...plan.linears.values()].filter(({ scheme, block }) => scheme === undefined && block >= 0);
  const padded = [...plan.linears.values()].find(({ linear, stored }) => linear.outFeatures !== stored.outFeatures || linear.inFeatures !== stored.inFeatures); // prettier-ignore
  if (padded) {
    throw badInput('GGUF has no place for widths that are padded to whole groups', {
      where: padded.linear.name,
      hint: 'Choose a smaller --group-size, or make the GGUF file by a command of its own.',
    });
  }
  const keep = kept.map(({ linear }) => `re:^${linear.name.replaceAll('.', '\\.')}$`);
  const own: Recipe = { ...recipe, blocks: recipe.blocks ?? 'q4_k' };
  return makePlan(open.model, open.checkpoint, own, { ...selection, keep }, { refuse: refuseInGguf });
}
