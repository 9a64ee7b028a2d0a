import { badUsage } from '../base/errors.js';
import { stopReading, type JobEnv } from '../backend/env.js';
import { gather } from '../tensor/ops.js';
import { Scope } from '../tensor/tensor.js';
import type { ResidentModel } from './resident.js';
import { Sampler, type SamplingOptions } from './sampler.js';

export interface GenerateOptions extends SamplingOptions {
  readonly maxNewTokens: number;
  /** Tokens that end a sequence; default: the model's. They are not part of the result. */
  readonly stopIds?: readonly number[];
  /** Called as each token is drawn. */
  readonly onToken?: (sequence: number, token: number, logprob: number) => void;
}

export interface Generated {
  readonly tokens: Int32Array;
  /** Natural log-probability of each token under the model. */
  readonly logprobs: Float64Array;
  readonly stopped: 'eos' | 'length';
}

/**
 * Continues prompts (token ids) with a KV cache, several at once. Sequence i draws from stream i of the seed, so that a
 * sequence does not depend on which others run beside it.
 * Errors: empty prompts, prompts that leave no room in the model's context, token ids outside the vocabulary.
 */
export async function generate(
  resident: ResidentModel,
  env: Pick<JobEnv, 'device' | 'signal'>,
  prompts: readonly Int32Array[],
  options: GenerateOptions,
): Promise<Generated[]> {
  const { model } = resident;
  prompts.forEach((prompt) => checkPrompt(prompt, model.vocab, model.context, options.maxNewTokens));
  const results = new Map<number, Generated>();
  for (const group of groups(prompts, !model.ragged)) {
    const outcome = await generateGroup(resident, env, prompts, group, options);
    group.forEach((i, row) => results.set(i, outcome[row]!));
  }
  return prompts.map((_, i) => results.get(i)!);
}

/** Batches: all prompts, or those of one length each. */
function groups(prompts: readonly Int32Array[], byLength: boolean): number[][] {
  const all = prompts.map((_, i) => i);
  if (!byLength) return all.length > 0 ? [all] : [];
  return [...new Set(prompts.map((p) => p.length))].map((length) => all.filter((i) => prompts[i]!.length === length));
}

function checkPrompt(prompt: Int32Array, vocab: number, context: number, maxNewTokens: number): void {
  if (prompt.length === 0) throw badUsage('The prompt has no tokens', { expected: 'at least one' });
  if (prompt.length + maxNewTokens > context) {
    throw badUsage("Prompt and continuation are longer than the model's context", {
      got: `${prompt.length} + ${maxNewTokens} tokens`,
      expected: `at most ${context}`,
      hint: 'Lower --max-new-tokens or shorten the prompt.',
    });
  }
  const odd = prompt.find((id) => id < 0 || id >= vocab);
  if (odd !== undefined) {
    throw badUsage('A token is outside the vocabulary of the model', {
      got: String(odd),
      expected: `0 to ${vocab - 1}`,
      hint: 'The tokenizer belongs to another model.',
    });
  }
}

async function generateGroup(
  resident: ResidentModel,
  env: Pick<JobEnv, 'device' | 'signal'>,
  prompts: readonly Int32Array[],
  group: readonly number[],
  options: GenerateOptions,
): Promise<Generated[]> {
  const { model } = resident;
  const stop = new Set(options.stopIds ?? model.eosIds);
  const lengths = group.map((i) => prompts[i]!.length);
  const batch = group.length;
  const width = Math.max(...lengths);
  const rows = group.map((i) => ({ sampler: new Sampler(options, i), tokens: [] as number[], logprobs: [] as number[], done: false })); // prettier-ignore

  using held = new Scope(env.device);
  const caches = resident.caches(held, lengths);
  let input = new Int32Array(batch * width);
  group.forEach((i, row) => input.set(prompts[i]!, row * width));
  for (let step = 0; step < options.maxNewTokens; step++) {
    stopReading(env);
    using scope = new Scope(env.device);
    const first = step === 0;
    const starts = first ? undefined : lengths.map((n) => n + step - 1);
    const x = resident.hidden(scope, input, batch, {
      caches,
      ...(starts && { starts }),
      ...(lengths.some((n) => n !== width) && { lengths: lengths.map((n) => n + step) }),
    });
    const ends = Int32Array.from(lengths, (n, row) => (first ? row * width + n - 1 : row));
    const last = gather(scope, x, scope.from('i32', [batch], ends));
    const logits = await resident.logits(scope, last).float32();
    input = new Int32Array(batch);
    rows.forEach((row, b) => {
      const { token, logprob } = row.sampler.draw(logits.subarray(b * model.vocab, (b + 1) * model.vocab));
      input[b] = token;
      if (row.done) return;
      if (stop.has(token)) {
        row.done = true;
        return;
      }
      row.tokens.push(token);
      row.logprobs.push(logprob);
      options.onToken?.(group[b]!, token, logprob);
    });
    if (rows.every((row) => row.done)) break;
  }
  return rows.map(({ tokens, logprobs, done }) => ({
    tokens: Int32Array.from(tokens),
    logprobs: Float64Array.from(logprobs),
    stopped: done ? 'eos' : 'length',
  }));
}
