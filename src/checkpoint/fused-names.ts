/**
 * Names of matrices that hold several linears of one input, as Phi-3 and onnxruntime-genai have them. Leaves without a
 * name of their own (Mixtral's w1 and w3) are joined by a plus.
 */
const known: Readonly<Record<string, string>> = {
  'q_proj+k_proj+v_proj': 'qkv_proj',
  'gate_proj+up_proj': 'gate_up_proj',
};
const leaves = new Map(Object.entries(known).map(([parts, fused]) => [fused, parts.split('+')]));

const cut = (name: string): [folder: string, leaf: string] => {
  const at = name.lastIndexOf('.') + 1;
  return [name.slice(0, at), name.slice(at)];
};

/** `model.layers.0.mlp.gate_proj`, `...up_proj` -> `model.layers.0.mlp.gate_up_proj`. */
export function fusedName(modules: readonly string[]): string {
  const joined = modules.map((name) => cut(name)[1]).join('+');
  return `${cut(modules[0]!)[0]}${known[joined] ?? joined}`;
}

/** The linears that a fused matrix holds, by module name; undefined: it is a linear of its own. */
export function fusedParts(module: string): string[] | undefined {
  const [folder, leaf] = cut(module);
  const parts = leaves.get(leaf) ?? (leaf.includes('+') ? leaf.split('+') : undefined);
  return parts?.map((part) => `${folder}${part}`);
}
