import { badInput, badUsage } from '../base/errors.js';
import { Random } from '../base/rng.js';
import { stopReading, type JobEnv } from '../backend/env.js';
import { gather, sample, type SampleOptions } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { ResidentModel } from './resident.js';

export interface GenerateOptions extends SampleOptions {
  readonly maxNewTokens: number;
  /** Always the most probable token. */
  readonly greedy?: boolean;
  readonly seed?: number;
  /** Tokens that end a sequence; default: the model's. They are not part of the result. */
  readonly stopIds?: readonly number[];
  /** Called for each token, some steps after it was drawn. */
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

/** Tokens are drawn and taken in again on the device; this often the host looks at them. */
const stepsAhead = 16;

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
  const { maxNewTokens, greedy = false, temperature = 1 } = options;
  const how = { ...options, temperature: greedy ? 0 : temperature };
  const lengths = group.map((i) => prompts[i]!.length);
  const batch = group.length;
  const width = Math.max(...lengths);
  const padded = lengths.some((n) => n !== width);
  const streams = group.map((i) => new Random(options.seed ?? 0, i));
  const rows = group.map((sequence) => new Row(sequence, options, model.eosIds));

  using held = new Scope(env.device);
  const caches = resident.caches(held, lengths);
  const drawn = held.empty('i32', [maxNewTokens, batch]);
  const logprobs = held.empty('f32', [maxNewTokens, batch]);
  let input: Int32Array | Tensor = new Int32Array(batch * width);
  for (const [row, i] of group.entries()) input.set(prompts[i]!, row * width);
  for (let from = 0; from < maxNewTokens && !rows.every((row) => row.done);) {
    stopReading(env);
    const to = Math.min(maxNewTokens, from + (resident.looksUp ? 1 : stepsAhead));
    for (let step = from; step < to; step++) {
      using scope = new Scope(env.device);
      const x = resident.hidden(scope, input, batch, {
        caches,
        ...(step > 0 && { starts: lengths.map((n) => n + step - 1) }),
        ...(padded && { lengths: lengths.map((n) => n + step) }),
      });
      const ends = Int32Array.from(lengths, (n, row) => row * width + n - 1);
      const last = step === 0 ? gather(scope, x, scope.from('i32', [batch], ends)) : x;
      const u = scope.from(
        'f64',
        [batch],
        Float64Array.from(streams, (random) => random.uniform()),
      );
      const [out, logprob] = [drawn.at(step), logprobs.at(step)];
      input = sample(scope, resident.logits(scope, last), u, how, { out, logprob });
    }
    const [tokens, certain] = await Promise.all([
      drawn.slice(0, from, to).int32(),
      logprobs.slice(0, from, to).float32(),
    ]);
    tokens.forEach((token, i) => rows[i % batch]!.add(token, certain[i]!));
    if (resident.looksUp) input = tokens;
    from = to;
  }
  return rows.map((row) => row.result());
}

/** One sequence as it grows. */
class Row {
  done = false;
  readonly #tokens: number[] = [];
  readonly #logprobs: number[] = [];
  readonly #stop: ReadonlySet<number>;

  constructor(
    readonly sequence: number,
    readonly options: GenerateOptions,
    eosIds: readonly number[],
  ) {
    this.#stop = new Set(options.stopIds ?? eosIds);
  }

  add(token: number, logprob: number): void {
    if (this.done) return;
    if (token < 0) {
      throw badInput('The model gives logits that are not numbers: no token can be drawn', {
        got: `NaN or infinity after ${this.#tokens.length} tokens`,
        hint: 'Look for weights that are not finite: deepseek-convert inspect --statistics. In bf16, try --dtype f32.',
      });
    }
    if (this.#stop.has(token)) {
      this.done = true;
      return;
    }
    this.#tokens.push(token);
    this.#logprobs.push(logprob);
    this.options.onToken?.(this.sequence, token, logprob);
  }

  result(): Generated {
    return {
      tokens: Int32Array.from(this.#tokens),
      logprobs: Float64Array.from(this.#logprobs),
      stopped: this.done ? 'eos' : 'length',
    };
  }
}
