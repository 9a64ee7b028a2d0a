import { ConvertError } from '../base/errors.js';
import { dtypeSize, elementCount } from '../base/dtype.js';
import { writeFileAtomic } from '../base/files.js';
import { tool } from '../base/version.js';
import type { JobEnv } from '../backend/env.js';
import { openModel, type OpenModel } from '../arch/open.js';
import { inBasis, rotationOf, type RotatedBy } from '../arch/rotate.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { diagnose } from './diagnose.js';
import { judge, type GateBounds, type Measurements } from './gates.js';
import { compareGenerations } from './generations.js';
import { toHtml } from './report/html.js';
import { toJson } from './report/json.js';
import { toMarkdown } from './report/markdown.js';
import { reportSchema, reportVersion } from './report.js';
import type { LogitsResult, ModelFacts, Profile, ValidateReport, WorstToken } from './report.js';
import { compareStability } from './stability.js';
import { compareModels, type SidesResult } from './sides.js';
import { defaultTexts, excerpts, readPrompts, readWindows, type Windows } from './texts.js';
import { bringsTokenizer, compareTokenizers } from './tokenizer.js';

export interface ValidateOptions {
  /** Paths as `openModel` takes them. */
  readonly reference: string;
  readonly candidate: string;
  readonly referenceConfig?: string | undefined;
  readonly candidateConfig?: string | undefined;
  /** What the report calls them; default: their paths. */
  readonly names?: { readonly reference?: string; readonly candidate?: string };
  /** Text files; default: the tool's own held-out texts. */
  readonly texts?: readonly string[] | undefined;
  /** Windows in all; default 32. */
  readonly samples?: number | undefined;
  /** Tokens a window; default 512, at most what both models were made for. */
  readonly seqLen?: number | undefined;
  readonly seed?: number | undefined;
  /** What the candidate was rotated by, where no provenance beside it says so. */
  readonly rotation?: RotatedBy | undefined;
  /** Arithmetic; default f32 on the CPU, bf16 on a GPU. */
  readonly dtype?: 'f32' | 'bf16' | undefined;
  /** Column of default bounds; default: by what the models are. */
  readonly profile?: Profile | undefined;
  readonly bounds?: GateBounds | undefined;
  /** 0: none. Default 16 where the models fit into memory as a whole. */
  readonly generations?: number | undefined;
  readonly newTokens?: number | undefined;
  /** Tokens of each long generation; 0: none. Default: 1000 on a GPU, none on the CPU. */
  readonly longTokens?: number | undefined;
  /** 0: always the most probable token. */
  readonly temperature?: number | undefined;
  readonly prompts?: string | undefined;
  readonly resamples?: number | undefined;
  /** Sentences for the report, beside its own. */
  readonly notes?: readonly string[];
  /** Files to write: HTML, JSON, Markdown. */
  readonly report?: string | undefined;
  readonly reportJson?: string | undefined;
  readonly reportMd?: string | undefined;
}

const defaults = { samples: 32, seqLen: 512, generations: 16, newTokens: 64, temperature: 0.8, resamples: 1000 };

/**
 * Compares a candidate with its reference and judges it. Writes the reports that were asked for, whatever the verdict:
 * `gateFailure` turns a failed one into the error that ends a command.
 * Errors: what cannot be opened or compared; never a failed gate.
 */
export async function runValidate(options: ValidateOptions, env: JobEnv): Promise<ValidateReport> {
  const reference = await openModel(options.reference, { config: options.referenceConfig });
  try {
    const candidate = await openModel(options.candidate, { config: options.candidateConfig });
    try {
      const report = await validateModels(reference, candidate, options, env);
      await writeReports(report, options);
      return report;
    } finally {
      await candidate.close();
    }
  } finally {
    await reference.close();
  }
}

/** As `runValidate`, for models that are open already; writes nothing. */
export async function validateModels(
  reference: OpenModel,
  candidate: OpenModel,
  options: ValidateOptions,
  env: JobEnv,
): Promise<ValidateReport> {
  const { samples = defaults.samples, seed = 0, resamples = defaults.resamples } = options;
  const seqLen = Math.min(options.seqLen ?? defaults.seqLen, reference.model.context, candidate.model.context);
  const dtype = options.dtype ?? (env.device.kind === 'cpu' ? 'f32' : 'bf16');
  const notes: string[] = [...(options.notes ?? [])];
  const skipped: { part: string; reason: string }[] = [];

  const own = await reference.tokenizer();
  const chosen = options.texts?.length ? { files: [...options.texts], note: undefined } : await defaultTexts();
  if (chosen.note !== undefined) notes.push(chosen.note);
  const windows = await readWindows(reference, chosen.files, { samples, seqLen, seed }, env);
  const count = windows.reduce((total, { n }) => total + n, 0);
  if (count < samples) notes.push(`The texts hold ${count} windows of the ${samples} asked for.`);

  // One that is there and broken is an error.
  const other = bringsTokenizer(candidate) ? await candidate.tokenizer() : undefined;
  const tokenizer = other && (await compareTokenizers(own, other, await excerpts(chosen.files)));
  if (!tokenizer) skipped.push({ part: 'tokenizer', reason: 'the candidate brings none: the reference\'s is used for both' }); // prettier-ignore

  // Hidden states can be compared where both models have them in the same basis.
  const rotation = options.rotation ?? (await rotationOf(candidate.checkpoint.path));
  const basis = await inBasis(reference, rotation);
  const sides = await compareModels(basis, candidate, windows, { dtype, resamples, seed }, env);
  skipped.push(...sides.skipped);
  const plan = planGenerations(reference, candidate, options, dtype, env);
  if (typeof plan === 'string') skipped.push({ part: 'generations', reason: plan });
  const diversity =
    typeof plan === 'string'
      ? undefined
      : await compareGenerations(
          reference,
          candidate,
          own,
          await readPrompts(own, windows, { count: plan.prompts, file: options.prompts, bosId: reference.model.bosId }),
          {
            newTokens: plan.newTokens,
            temperature: options.temperature ?? defaults.temperature,
            seed,
            dtype,
            resamples,
          },
          env,
        );

  const long = planLong(reference, candidate, options, typeof plan !== 'string', env);
  if (typeof long === 'string') skipped.push({ part: 'long generations', reason: long });
  const stability =
    typeof long === 'string'
      ? undefined
      : await compareStability(
          reference,
          candidate,
          await readPrompts(own, windows, { count: 4, file: options.prompts, bosId: reference.model.bosId }),
          { newTokens: long, temperature: options.temperature ?? defaults.temperature, seed, dtype, resamples },
          env,
        );

  const logits: LogitsResult = { ...sides.logits, worst: await spellWorst(sides, windows, own) };
  const measured: Measurements = {
    schema: reportSchema,
    version: reportVersion,
    profile: options.profile ?? profileOf(reference, candidate),
    reference: facts(reference, options.names?.reference),
    candidate: facts(candidate, options.names?.candidate),
    settings: {
      tool: `${tool.name} ${tool.version}`,
      device: env.device.kind,
      dtype,
      seed,
      samples: count,
      seqLen,
      tokens: windows.reduce((total, { n, length }) => total + n * length, 0),
      texts: windows.map(({ name, sha256, n, length }) => ({ name, sha256, tokens: n * length, windows: n })),
      bootstrap: resamples,
    },
    logits,
    layers: sides.layers,
    ...(sides.attention && { attention: sides.attention }),
    ...(sides.routing && { routing: sides.routing }),
    weights: sides.weights,
    ...(tokenizer && { tokenizer }),
    ...(diversity && { diversity }),
    ...(stability && { stability }),
    skipped,
    notes: [...notes, ...candidate.notes],
  };
  const gates = judge(measured, options.bounds ?? {});
  const passed = gates.every(({ status }) => status !== 'fail');
  return { ...measured, gates, passed, diagnosis: diagnose(measured, gates) };
}

/**
 * The error of a report whose gates failed: each one with value, bound, place and remedy.
 * @param after more lines for its end
 */
export function gateFailure(report: ValidateReport, after: readonly string[] = []): ConvertError | undefined {
  const failed = report.gates.filter(({ status }) => status === 'fail');
  if (failed.length === 0) return undefined;
  const checked = report.gates.filter(({ status }) => status === 'pass' || status === 'fail').length;
  const lines = failed.flatMap((gate) => {
    const value = gate.value === null ? 'not a finite number' : String(Number(gate.value.toPrecision(4)));
    const sign = gate.direction === 'max' ? 'at most' : 'at least';
    const where = gate.where === undefined ? '' : `; ${gate.where}`;
    return [`${gate.name}: ${value}, ${sign} ${gate.bound} (${gate.flag})${where}`, `  ${gate.remedy}.`];
  });
  return new ConvertError('gate', `${failed.length} of ${checked} quality gates failed`, {
    where: report.candidate.path,
    hint: [...lines, ...report.diagnosis, ...after].join('\n  '),
  });
}

export async function writeReports(
  report: ValidateReport,
  { report: html, reportJson, reportMd }: Pick<ValidateOptions, 'report' | 'reportJson' | 'reportMd'>,
): Promise<void> {
  if (html !== undefined) await writeFileAtomic(html, toHtml(report));
  if (reportJson !== undefined) await writeFileAtomic(reportJson, toJson(report));
  if (reportMd !== undefined) await writeFileAtomic(reportMd, toMarkdown(report));
}

/** Bounds for a dense model that became a mixture of experts, or lost layers or width, are wider. */
function profileOf(reference: OpenModel, candidate: OpenModel): Profile {
  const [a, b] = [reference.model, candidate.model];
  const same =
    a.hidden === b.hidden &&
    a.blocks.length === b.blocks.length &&
    a.blocks.every((block, i) => (block.moe?.experts ?? 0) === (b.blocks[i]!.moe?.experts ?? 0));
  return same ? 'quantized' : 'restructured';
}

function facts({ checkpoint, model, tensors, coverage, layout }: OpenModel, name: string | undefined): ModelFacts {
  const specs = [...model.outer, ...model.blocks.flatMap((block) => block.tensors)];
  const present = specs.filter((spec) => tensors.has(spec.name) && !(spec.optional && model.tied));
  const moe = model.blocks.find((block) => block.moe)?.moe;
  const sources = new Set(coverage.claimed.flatMap((claimed) => tensors.get(claimed)!.sources));
  let storedBytes = 0;
  for (const source of sources) storedBytes += checkpoint.tensors.get(source)?.span.bytes ?? 0;
  const method = (checkpoint.config.quantization_config as { quant_method?: unknown } | undefined)?.quant_method;
  const quantization = layout === undefined ? undefined : typeof method === 'string' ? method : 'quantized';
  return {
    path: name ?? checkpoint.path,
    format: checkpoint.format,
    modelType: model.modelType,
    parameters: present.reduce((total, spec) => total + elementCount(spec.shape), 0),
    storedBytes,
    layers: model.blocks.length,
    heads: model.heads,
    hidden: model.hidden,
    vocab: model.vocab,
    ...(moe && { experts: { total: moe.experts, active: moe.active, shared: moe.shared } }),
    ...(quantization !== undefined && { quantization }),
    fingerprint: checkpoint.fingerprint,
  };
}

/** How many generations of what length, or why none. */
function planGenerations(
  reference: OpenModel,
  candidate: OpenModel,
  options: ValidateOptions,
  dtype: 'f32' | 'bf16',
  env: JobEnv,
): { prompts: number; newTokens: number } | string {
  if (options.generations === 0) return 'switched off (--generations 0)';
  const room = Math.min(reference.model.context, candidate.model.context) - 64;
  if (room < 1) return 'the context of the models is too short';
  const newTokens = Math.min(options.newTokens ?? defaults.newTokens, room);
  if (options.generations !== undefined) return { prompts: options.generations, newTokens };
  const bytes = dtypeSize(dtype) * Math.max(facts(reference, undefined).parameters, facts(candidate, undefined).parameters); // prettier-ignore
  if (bytes > 0.6 * env.device.available())
    return 'a whole model does not fit into memory (--generations 16 tries all the same)';
  return { prompts: defaults.generations, newTokens };
}

/** Tokens of the long generations, or why none. */
function planLong(
  reference: OpenModel,
  candidate: OpenModel,
  { longTokens }: ValidateOptions,
  generates: boolean,
  env: JobEnv,
): number | string {
  if (longTokens === 0) return 'switched off (--long-tokens 0)';
  if (longTokens === undefined && env.device.kind === 'cpu')
    return 'on the CPU only when asked for (--long-tokens 1000)';
  if (longTokens === undefined && !generates) return 'no generations are made';
  const room = Math.min(reference.model.context, candidate.model.context) - 16;
  const tokens = Math.min(longTokens ?? 1000, room);
  return tokens < 64 ? 'the context of the models is too short' : tokens;
}

async function spellWorst(
  { worst }: SidesResult,
  windows: readonly Windows[],
  tokenizer: Tokenizer,
): Promise<WorstToken[]> {
  const spell = (ids: Iterable<number>): Promise<string> => tokenizer.decode(ids, { special: true });
  return Promise.all(
    worst.map(async ({ text, window, position, kl, target, reference, candidate }): Promise<WorstToken> => {
      const { name, tokens, length } = windows[text]!;
      const at = window * length + position;
      return {
        text: name,
        window,
        position,
        kl,
        before: await spell(tokens.subarray(Math.max(window * length, at - 11), at + 1)),
        actual: await spell([target]),
        reference: await spell([reference]),
        candidate: await spell([candidate]),
      };
    }),
  );
}
