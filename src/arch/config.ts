import { badInput } from '../base/errors.js';

/** Keys that say nothing of the mathematics of inference, as transformers 4 and 5 and common trainers write them. */
const harmless: ReadonlySet<string> = new Set(
  `architectures model_type dtype torch_dtype transformers_version auto_map tokenizer_class quantization_config
  bos_token_id eos_token_id pad_token_id sep_token_id cls_token_id unk_token_id mask_token_id decoder_start_token_id
  use_cache initializer_range initializer_std init_std pretraining_tp gradient_checkpointing ep_size tp_plan
  attn_implementation return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss
  pruned_heads max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature
  top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size
  bad_words_ids num_return_sequences chunk_size_feed_forward output_scores return_dict_in_generate
  forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
  begin_suppress_tokens finetuning_task id2label label2id prefix task_specific_params problem_type num_labels
  router_aux_loss_coef router_z_loss_coef aux_loss_alpha seq_aux output_router_logits router_jitter_noise
  is_llama_config hybrid_cache cache_implementation keep_in_fp32 model_max_length max_sequence_length`
    .split(/\s+/)
    .filter(Boolean),
);
const harmlessPattern = /^_|^unsloth|dropout|_pdrop$|^summary_|^deepseek_convert$/;

/** Off, empty, absent: an unknown key with such a value changes nothing. */
const inert = (value: unknown): boolean =>
  value === null || value === false || (typeof value === 'object' && Object.keys(value).length === 0);

export interface Range {
  min?: number;
  max?: number;
  /** Used when the key is absent or null; without it the key is required. */
  default?: number;
}

/**
 * config.json, read key by key with expectations. `finish` refuses what nobody asked for: a key that is not understood
 * may change the mathematics, and then every later result would be wrong without a word.
 */
export class Config {
  readonly values: Readonly<Record<string, unknown>>;
  readonly #understood = new Set<string>();
  /** File, and key path within it: `config.json`, `config.json: rope_parameters`. */
  readonly where: string;

  /** What the tensor names of embedding, layers and norm start with. */
  readonly root: string;
  /** Whether the checkpoint stores a tensor, where that is known: for architectures that are spelled in several ways. */
  readonly stores: ((name: string) => boolean) | undefined;

  constructor(
    values: Readonly<Record<string, unknown>>,
    where: string,
    root = 'model',
    stores?: (name: string) => boolean,
  ) {
    this.values = values;
    this.where = where;
    this.root = root;
    this.stores = stores;
  }

  /** The value as it stands; absent keys and null are undefined. */
  raw(key: string): unknown {
    this.#understood.add(key);
    return Object.hasOwn(this.values, key) ? (this.values[key] ?? undefined) : undefined;
  }
  has(key: string): boolean {
    return this.raw(key) !== undefined;
  }
  /** The first of several names of one thing that is there. */
  oneOf(...keys: [string, ...string[]]): string {
    const present = keys.filter((key) => this.has(key));
    for (const key of present) {
      if (this.raw(key) !== this.raw(present[0]!)) {
        throw this.wrong(key, `the same as ${present[0]!} (${JSON.stringify(this.raw(present[0]!))})`);
      }
    }
    return present[0] ?? keys[0];
  }

  int(key: string, { min = 1, max = 2 ** 31, default: or }: Range = {}): number {
    const value = this.raw(key);
    if (value === undefined && or !== undefined) return or;
    if (typeof value !== 'number' || !Number.isSafeInteger(value) || value < min || value > max) {
      throw this.wrong(key, `an integer from ${min} to ${max}`);
    }
    return value;
  }
  float(key: string, { min = 0, max = 1e12, default: or }: Range = {}): number {
    const value = this.raw(key);
    if (value === undefined && or !== undefined) return or;
    if (typeof value !== 'number' || !(value >= min && value <= max)) {
      throw this.wrong(key, `a number from ${min} to ${max}`);
    }
    return value;
  }
  optionalInt(key: string, range: Range = {}): number | undefined {
    return this.has(key) ? this.int(key, range) : undefined;
  }
  optionalFloat(key: string, range: Range = {}): number | undefined {
    return this.has(key) ? this.float(key, range) : undefined;
  }
  bool(key: string, or: boolean): boolean {
    const value = this.raw(key) ?? or;
    if (typeof value !== 'boolean') throw this.wrong(key, 'true or false');
    return value;
  }
  choice<const T extends string>(key: string, known: readonly T[], or?: T): T {
    const value = this.raw(key) ?? or;
    if (!known.includes(value as T)) throw this.wrong(key, known.join(' or '));
    return value as T;
  }
  /** A list of `count` numbers (any count when undefined). */
  floats(key: string, count?: number): number[] {
    const value = this.raw(key);
    const fits =
      Array.isArray(value) &&
      (count === undefined || value.length === count) &&
      value.every((v) => typeof v === 'number' && Number.isFinite(v));
    if (!fits) throw this.wrong(key, `a list of ${count ?? ''} numbers`);
    return value as number[];
  }
  /** A list of `count` of the words `known`, or undefined. */
  words<const T extends string>(key: string, known: readonly T[], count: number): T[] | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    if (!Array.isArray(value) || value.length !== count || !value.every((v) => known.includes(v as T))) {
      throw this.wrong(key, `a list of ${count} of: ${known.join(', ')}`);
    }
    return value as T[];
  }
  /** One integer, a list of them, or nothing: always a list. */
  ids(key: string): number[] {
    const value = this.raw(key);
    if (value === undefined) return [];
    const list = Array.isArray(value) ? (value as unknown[]) : [value];
    if (!list.every((v) => Number.isSafeInteger(v) && (v as number) >= -1)) throw this.wrong(key, 'token ids');
    return (list as number[]).filter((id) => id >= 0);
  }
  /** A nested object, or undefined. */
  object(key: string): Config | undefined {
    const value = this.raw(key);
    if (value === undefined) return undefined;
    if (typeof value !== 'object' || Array.isArray(value)) throw this.wrong(key, 'an object');
    return new Config(value as Record<string, unknown>, `${this.where}: ${key}`);
  }
  /** Says that `keys` were looked at elsewhere, or do not matter here. */
  understood(...keys: string[]): void {
    for (const key of keys) this.#understood.add(key);
  }
  /** `key` may only have the values `fine` (or be absent): anything else is mathematics that we lack. */
  only(key: string, ...fine: unknown[]): void {
    const value = this.raw(key);
    if (value !== undefined && !fine.includes(value)) {
      throw this.wrong(key, fine.map((v) => JSON.stringify(v)).join(' or '), 'This variant is not supported.');
    }
  }

  wrong(key: string, expected: string, hint?: string): Error {
    const value = this.values[key];
    const got = value === undefined ? 'nothing' : (JSON.stringify(value) ?? typeof value).slice(0, 200);
    return badInput(`Configuration key ${key} is ${value === undefined || value === null ? 'missing' : 'not usable'}`, {
      where: this.where,
      got,
      expected,
      ...(hint !== undefined && { hint }),
    });
  }

  /** Refuses keys that were neither read nor are known to be harmless. */
  finish(): void {
    for (const [key, value] of Object.entries(this.values)) {
      if (this.#understood.has(key) || harmless.has(key) || harmlessPattern.test(key) || inert(value)) continue;
      throw badInput(`Configuration key ${key} is not understood`, {
        where: this.where,
        got: (JSON.stringify(value) ?? typeof value).slice(0, 200),
        expected: 'only keys that this architecture knows',
        hint: 'It may change what the model computes. If it does not, remove it from the config and run again.',
      });
    }
  }
}

/** Sizes that no real model exceeds: beyond them a config is broken or hostile. */
export const limits = {
  layers: 2048,
  hidden: 2 ** 18,
  heads: 2 ** 14,
  width: 2 ** 22,
  vocab: 2 ** 24,
  experts: 2 ** 14,
  /** Of all layers together. */
  allExperts: 2 ** 20,
} as const;
