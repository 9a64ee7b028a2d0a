import { ConvertError } from '../base/errors.js';

/** What `quantize` and `moe` would make of a model with their defaults, or why they would refuse it. */
export interface Outlook {
  readonly quantize: QuantizeOutlook | Refused;
  readonly moe: MoeOutlook | Refused;
}
export interface Refused {
  readonly refused: string;
}
export interface QuantizeOutlook {
  readonly linears: number;
  /** Linears that stay in high precision, by reason. */
  readonly left: readonly { readonly reason: string; readonly linears: number }[];
  readonly bitsPerWeight: number;
  readonly bytes: { readonly from: number; readonly to: number };
}
export interface MoeOutlook {
  readonly container: string;
  /** `8 experts of 128, 2 active, 1 shared (...)`. */
  readonly shape: string;
  readonly bytes: { readonly from: number; readonly to: number };
}

/** Reads headers only. */
export async function outlook(input: string, config: string | undefined): Promise<Outlook> {
  const given = { input, ...(config !== undefined && { config }) };
  return { quantize: await orRefused(() => quantizing(given)), moe: await orRefused(() => dividing(given)) };
}

interface Input {
  readonly input: string;
  readonly config?: string;
}

async function orRefused<T>(plan: () => Promise<T>): Promise<T | Refused> {
  try {
    return await plan();
  } catch (error) {
    if (!(error instanceof ConvertError) || (error.kind !== 'input' && error.kind !== 'usage')) throw error;
    return { refused: error.message.split('\n')[0]! };
  }
}

async function quantizing(given: Input): Promise<QuantizeOutlook> {
  const { previewQuantize } = await import('../quant/prepare.js');
  const { defaultRecipe } = await import('../quant/scheme.js');
  const { plan, inputBytes, output } = await previewQuantize({
    ...given,
    out: '',
    recipe: defaultRecipe,
    formats: ['compressed-tensors'],
    tool: { name: 'deepseek-convert', version: '' },
    commandLine: '',
  });
  const left = new Map<string, number>();
  for (const { reason } of plan.linears.values()) {
    if (reason === undefined) continue;
    // Reasons that name another linear are one reason.
    const kind = reason.replace(/^engines fuse it with .*: /, '');
    left.set(kind, (left.get(kind) ?? 0) + 1);
  }
  return {
    linears: plan.totals.quantized,
    left: [...left].map(([reason, linears]) => ({ reason, linears })),
    bitsPerWeight: plan.totals.bitsPerWeight,
    bytes: { from: inputBytes, to: output.bytes },
  };
}

async function dividing({ input, config }: Input): Promise<MoeOutlook> {
  const { openModel } = await import('../arch/open.js');
  const { describeShape, makePlan } = await import('../moe/plan.js');
  const open = await openModel(input, { config });
  try {
    const recipe = { method: 'split', container: 'glm4_moe', experts: 8, active: 2 } as const;
    const { container, shape, inputBytes, outputBytes } = makePlan(open, recipe, false);
    return {
      container: container.name,
      shape: describeShape(shape),
      bytes: { from: inputBytes, to: outputBytes },
    };
  } finally {
    await open.close();
  }
}
