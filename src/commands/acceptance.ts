import { join } from 'node:path';
import { badUsage, type ConvertError } from '../base/errors.js';
import type { Json } from '../base/job.js';
import { flag, integer, list } from '../base/options.js';
import type { JobEnv } from '../backend/env.js';
import type { RotatedBy } from '../arch/rotate.js';
import type { Accept, StagedOutput } from '../checkpoint/types.js';
import type { GateBounds } from '../validate/gates.js';
import type { ValidateReport } from '../validate/report.js';
import { boundsOf, gateOptions, reportOptions } from './gate-options.js';
import type { CommandResult, Io } from './types.js';
import { verdictLine } from './verdict.js';

const section = 'Validation of the output:';

/** Spread into the options of each command whose output is validated before it gets its name. */
export const acceptanceOptions = {
  validate: flag({ default: true, section, help: 'Compare the output with the input on held-out text before it gets its name.', off: 'Give the output its name without comparing it with the input on held-out text.' }), // prettier-ignore
  keepFailed: flag({ section, help: 'Give the output its name although a gate failed; the exit code stays 3.' }),
  validateText: list({ value: 'file', section, help: 'Text to compare on (.txt, .jsonl); repeatable. Default: held-out texts of this tool.' }), // prettier-ignore
  validateSamples: integer({ min: 1, default: 8, section, help: 'Windows of up to 512 tokens to compare on.' }),
  ...reportOptions,
  ...gateOptions,
} as const;

interface Given {
  readonly input: string;
  readonly config: string | undefined;
  readonly out: string;
  readonly seed: number;
  readonly rotate?: RotatedBy['kind'] | undefined;
  readonly validate: boolean;
  readonly keepFailed: boolean;
  readonly validateText: readonly string[];
  readonly validateSamples: number;
  readonly report: string | undefined;
  readonly reportJson: string | undefined;
  readonly reportMd: string | undefined;
}

export interface Acceptance {
  /** For the job; undefined with --no-validate. */
  readonly accept: Accept | undefined;
  /** The command's result with the verdict added. */
  readonly extend: (result: CommandResult) => CommandResult;
}

/**
 * The short validation of a job's output against its input. A failed gate refuses the output its name, or with
 * --keep-failed becomes the failure of a command that did its work.
 * @param shownOnly gates that are measured and decide nothing unless the user gives a bound, and why
 */
export function acceptance(
  given: Given,
  io: Io,
  env: JobEnv,
  shownOnly?: { readonly ids: readonly string[]; readonly reason: string },
): Acceptance {
  if (!given.validate && given.keepFailed) {
    throw badUsage('--keep-failed has nothing to keep where nothing is validated', { got: '--no-validate --keep-failed' }); // prettier-ignore
  }
  let report: ValidateReport | undefined;
  let failure: ConvertError | undefined;
  let skipped = given.validate ? undefined : 'switched off (--no-validate)';

  const accept = async (staged: StagedOutput): Promise<Json> => {
    const { gateFailure, runValidate, writeReports } = await import('../validate/run.js');
    skipped = await withoutTokenizer(given);
    if (skipped !== undefined) {
      env.log.warn(`The output is not validated: ${skipped}.`);
      return { skipped };
    }
    env.log.info(`Validating the output on ${given.validateSamples} windows of text (--no-validate skips it)`);
    const shown: GateBounds = Object.fromEntries((shownOnly?.ids ?? []).map((id) => [id, null]));
    report = await runValidate(
      {
        reference: given.input,
        referenceConfig: given.config,
        candidate: staged.path,
        names: { reference: given.input, candidate: given.out },
        texts: given.validateText,
        samples: given.validateSamples,
        generations: 0,
        longTokens: 0,
        seed: given.seed,
        ...(given.rotate !== undefined && { rotation: { kind: given.rotate, seed: given.seed } }),
        bounds: { ...shown, ...boundsOf(given) },
        notes: shownOnly ? [shownOnly.reason] : [],
        report: given.report,
        reportJson: given.reportJson,
        reportMd: given.reportMd,
      },
      env,
    );
    const failed = gateFailure(report, given.keepFailed ? keptHint(given) : refusedHint(staged));
    if (failed && !given.keepFailed) {
      const { workFolder } = staged;
      await writeReports(report, { report: join(workFolder, 'validation.html'), reportJson: join(workFolder, 'validation.json') }); // prettier-ignore
      throw failed;
    }
    failure = failed;
    return verdictOf(report);
  };

  return {
    accept: given.validate ? accept : undefined,
    extend: ({ data, text, ...rest }) => {
      const line = report ? verdictLine(report, io) : skipped === undefined ? undefined : `not validated: ${skipped}`;
      return {
        ...rest,
        data: { ...data, validation: report ? verdictOf(report) : skipped === undefined ? null : { skipped } },
        text: line === undefined ? text : `${text.trimEnd()}\n${line}\n`,
        ...(failure && { failure }),
      };
    },
  };
}

/** Why nothing can be compared; a tokenizer that is there and broken is an error of its own. */
async function withoutTokenizer({ input, config }: Given): Promise<string | undefined> {
  const { openModel } = await import('../arch/open.js');
  const { bringsTokenizer } = await import('../validate/tokenizer.js');
  const open = await openModel(input, { config });
  await open.close();
  return bringsTokenizer(open) ? undefined : 'the model has no tokenizer.json, so there is no text to compare on';
}

const refusedHint = ({ path, workFolder }: StagedOutput): string[] => [
  `The output did not get its name. It lies complete in ${path}, and what was measured in ${join(workFolder, 'validation.html')} and .json.`,
  `The same command with --keep-failed gives it its name all the same; rm -r ${workFolder} throws it away.`,
];

const keptHint = ({ out }: Given): string[] => [`The output has its name, ${out}, because of --keep-failed.`];

/** What the provenance file and --json say of it. */
function verdictOf({ passed, profile, gates, settings, logits }: ValidateReport): { readonly [key: string]: Json } {
  return {
    passed,
    profile,
    tokens: settings.tokens,
    texts: settings.texts.map(({ name, sha256, windows }) => ({ name, sha256, windows })),
    kl: logits.kl,
    top1: logits.top1,
    perplexity: logits.perplexity,
    gates: gates.map(({ id, status, value, bound, where, reason }) => ({
      id,
      status,
      value,
      bound,
      ...(where !== undefined && { where }),
      ...(reason !== undefined && { reason }),
    })),
  };
}
