import { bug } from '../../base/errors.js';
import type { Json } from '../../base/job.js';
import { count } from '../../base/text.js';
import { openModel, type OpenModel } from '../../arch/open.js';
import { createWriter, isFileOutput } from '../../checkpoint/writer.js';
import { Scope } from '../../tensor/tensor.js';
import type { EndToEndOutcome } from '../end-to-end.js';
import { asJson, sameTensors, writeRest, writeValue } from '../output.js';
import { pass } from '../pass.js';
import { loadTeacher } from '../setting.js';
import { StudentReader } from '../student.js';
import type { HeldOut, Made, Run } from './options.js';
import type { LearningBlock } from './units.js';

/**
 * The stored mixture is computed in another order than it was trained in; in bf16 its routers are rounded too. In parts of
 * the KL before.
 */
const tolerance = { f32: 1e-3, bf16: 0.2 } as const;

/** Writes the mixture under the names that it had, opens what was written, and measures it. */
export async function writeMixture(
  run: Run,
  blocks: readonly LearningBlock[],
  training: EndToEndOutcome,
): Promise<Made> {
  const { options, env, job, teacher, mixture, recipe } = run;
  const { checkpoint } = mixture;
  let done: Made | undefined;
  const writer = await createWriter({
    job,
    format: isFileOutput(options.out) && !options.out.endsWith('.safetensors') ? 'torch' : 'safetensors',
    tensors: sameTensors(mixture),
    inPlanOrder: true,
    ...(options.shardSize !== undefined && { shardSize: options.shardSize }),
    config: checkpoint.config,
    companions: checkpoint.companions,
    extraFiles: new Map([...checkpoint.extraFiles, ['README.md', card(run, training)]]),
    provenance: {
      tool: options.tool,
      recipe: { command: options.commandLine, ...recipe },
      inputs: teacher.checkpoint.files,
    },
    accept: async (staged) => {
      done = { training, heldOut: await measured(run, staged.path, training) };
      await job.mark('written', asJson(done));
      const verdict = await options.accept?.(staged);
      return { ...(verdict as Record<string, never> | undefined), heldOut: asJson(done.heldOut) };
    },
  });
  try {
    const learned = new Set<string>();
    for (const unit of blocks.flatMap(({ units }) => units)) {
      for (const name of unit.names) learned.add(name);
      if (unit.names.every((name) => writer.has(name))) continue;
      using scope = new Scope(env.device);
      await writeValue(mixture, writer, unit.names, unit.value(scope));
    }
    await writeRest(mixture, writer, learned);
    await Promise.all([teacher, mixture].map((open) => open.checkpoint.assertUnchanged()));
    const { tool: _, inputs: __, outputs: ___, ...mixtureReport } = run.making;
    await writer.finish({ mixture: mixtureReport, distillation: asJson(training) });
    return done!;
  } finally {
    await writer.close();
  }
}

/** What an output that is there already says of its making. */
export function fromProvenance({ distillation, validation }: Readonly<Record<string, Json>>): Made {
  const { heldOut } = validation as { readonly heldOut: Json };
  return { training: distillation as unknown as EndToEndOutcome, heldOut: heldOut as unknown as HeldOut };
}

/** The dense model, the mixture before, and what was stored, on the windows that judge. */
async function measured(run: Run, path: string, { judgements, best }: EndToEndOutcome): Promise<HeldOut> {
  const { held, dtype } = run;
  const judged = judgements.find(({ step }) => step === best)!;
  const open = await openModel(path);
  try {
    const [before, after] = [judgements[0]!.kl!, await klOf(run, open)];
    // What was judged while training is what has been stored, or something is wrong.
    if (!(Math.abs(after - judged.kl!) <= tolerance[dtype] * before)) {
      throw bug('The stored mixture does not predict what was trained', {
        where: path,
        expected: `KL ${judged.kl} on held-out windows`,
        got: String(after),
      });
    }
    return { windows: held, before, after };
  } finally {
    await open.close();
  }
}

/** KL(dense || mixture) on the windows that judge, by the container's own forward pass. */
async function klOf({ env, set, held, dtype, microBatch, teacher }: Run, open: OpenModel): Promise<number> {
  using scope = new Scope(env.device);
  const reader = new StudentReader(open, env.device, dtype);
  const { model } = open;
  const outer = await reader.fixed(model.outer, scope);
  const dense = await loadTeacher(teacher, env, dtype, scope);
  const weights = await loadTeacher(open, env, dtype, scope);
  const blocks = weights.blocks.map((block) => ({ parameters: [], now: () => block }));
  const loss = { crossEntropy: 0, kl: 1, hidden: 0 };
  let sum = 0;
  for (let row = set.n - held; row < set.n; row += microBatch) {
    const rows = Math.min(microBatch, set.n - row);
    const ids = set.tokens.slice(row * set.seqLen, (row + rows) * set.seqLen);
    const { kl } = await pass({ device: env.device, model, outer, blocks, teacher: dense, loss, recompute: true }, ids, rows, held); // prettier-ignore
    sum += kl;
  }
  return sum;
}

/** README.md of the output. */
function card({ options, set, mixture, teacher }: Run, { steps, best }: EndToEndOutcome): string {
  const { tool, part, tokens } = options;
  const moe = mixture.model.blocks.find((block) => block.moe)!.moe!;
  return [
    '# Mixture of experts, distilled',
    '',
    `Made from a dense model (${teacher.model.modelType}) by ${tool.name} ${tool.version}: its feed-forward layers were divided among ${moe.experts} experts, ${moe.active} of them active, and then trained against the dense model's predictions (${part}, ${count(tokens)} tokens asked for, step ${best} of ${steps.length} kept). With all experts on it is no longer the dense model.`,
    '',
    `Text: ${set.description} (SHA-256 of the tokens ${set.hash}).`,
    '',
    'How the mixture was made and tested before, recipe, losses, gradient norms and what was measured stand in `deepseek-convert.json`.',
    '',
  ].join('\n');
}
