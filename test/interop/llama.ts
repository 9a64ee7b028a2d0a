interface Evaluated {
  readonly next?: { readonly logits?: ReadonlyMap<number, number>; readonly totalLogitWeight?: number };
}
interface Sequence {
  clearHistory(): Promise<void>;
  controlledEvaluate(input: readonly unknown[]): Promise<readonly (Evaluated | undefined)[]>;
}
interface LlamaModel {
  readonly trainContextSize: number;
  tokenize(text: string, special?: boolean): number[];
  createContext(options: object): Promise<{ getSequence(): Sequence; dispose(): Promise<void> }>;
  dispose(): Promise<void>;
}
interface Llama {
  loadModel(options: object): Promise<LlamaModel>;
  dispose(): Promise<void>;
}
interface Library {
  getLlama(options: object): Promise<Llama>;
}

/** The model's own distribution: nothing cut off, nothing sharpened. */
const plain = { temperature: 1, topK: 0, topP: 1, minP: 0 };

let llama: Promise<Llama> | undefined;

/** llama.cpp by node-llama-cpp: the prebuilt CPU binary, nothing compiled or fetched. */
function start(): Promise<Llama> {
  const name: string = 'node-llama-cpp';
  llama ??= (import(name) as Promise<Library>).then((library) =>
    library.getLlama({ gpu: false, build: 'never', logLevel: 'error', maxThreads: 1 }),
  );
  return llama;
}

export interface LlamaScore {
  /** ln p of each token given those before it in its window; NaN for the first of each. */
  readonly logprobs: Float64Array;
  readonly perplexity: number;
  /** ln p of the whole vocabulary at some positions, where asked for. */
  readonly rows: readonly Float64Array[];
}

/** Scores tokens in windows that know nothing of each other. `every`: rows of the whole distribution to keep. */
export async function llamaScore(path: string, tokens: Int32Array, window: number, every = 0): Promise<LlamaScore> {
  const model = await (await start()).loadModel({ modelPath: path, gpuLayers: 0 });
  const context = await model.createContext({
    ...{ contextSize: window, batchSize: window, flashAttention: false },
    ...{ experimentalKvCacheKeyType: 'F32', experimentalKvCacheValueType: 'F32' },
  });
  const sequence = context.getSequence();
  const logprobs = new Float64Array(tokens.length).fill(NaN);
  const rows: Float64Array[] = [];
  let [sum, scored] = [0, 0];
  for (let from = 0; from < tokens.length; from += window) {
    const part = tokens.subarray(from, Math.min(from + window, tokens.length));
    await sequence.clearHistory();
    const whole = (i: number) => every > 0 && (from + i) % every === 0;
    const input = Array.from(part, (token, i) => {
      const filter = { tokens: i + 1 < part.length ? [part[i + 1]!] : [], includeTop: 1 };
      return [
        token,
        { generateNext: { logits: whole(i) ? true : { filter }, totalLogitWeight: true, options: plain } },
      ];
    });
    const out = await sequence.controlledEvaluate(input);
    for (let i = 0; i + 1 < part.length; i++) {
      const { logits, totalLogitWeight } = out[i]!.next!;
      let largest = -Infinity;
      for (const logit of logits!.values()) largest = Math.max(largest, logit);
      const total = largest + Math.log(totalLogitWeight!);
      const value = logits!.get(part[i + 1]!)! - total;
      logprobs[from + i + 1] = value;
      sum += value;
      scored++;
      if (!whole(i)) continue;
      const row = new Float64Array(logits!.size);
      for (const [id, logit] of logits!) row[id] = logit - total;
      rows.push(row);
    }
  }
  await context.dispose();
  await model.dispose();
  return { logprobs, perplexity: Math.exp(-sum / scored), rows };
}

/** What llama.cpp makes of a text with the file's own tokenizer. */
export async function llamaTokens(path: string, text: string): Promise<number[]> {
  const model = await (await start()).loadModel({ modelPath: path, gpuLayers: 0, vocabOnly: true });
  const tokens = model.tokenize(text);
  await model.dispose();
  return tokens;
}
