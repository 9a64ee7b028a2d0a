import { badUsage } from '../base/errors.js';
import type { Checkpoint } from '../checkpoint/types.js';
import type { OutputFormat } from '../checkpoint/layout.js';
import { foldFactors } from './fuse-fold.js';
import { fuseToPhi3, splitPhi3 } from './fuse-phi3.js';
import { fusings, type Fuse, type Fusion, type Reshaped } from './fusion.js';

/** Errors: what does not go together, and formats that have no place for it. */
export function checkFuse(fuse: ReadonlySet<Fuse>, format: OutputFormat, mergesLora: boolean, inBlocks: boolean): void {
  if (fuse.size === 0) return;
  const fused = fusings.filter((kind) => fuse.has(kind));
  const given = `--fuse ${[...fuse].join(',')}`;
  if (mergesLora) throw badUsage('--fuse does not go together with --merge-lora', { hint: 'Merge first, then convert the result.' }); // prettier-ignore
  if (fuse.has('fold') && inBlocks) throw badUsage('--fuse fold does not go together with block types: what is rounded cannot be compared', { hint: 'Fold into a folder first, then convert that.' }); // prettier-ignore
  if (fuse.has('split') && fused.length > 0) throw badUsage('--fuse split is the opposite of qkv and gate-up', { got: given }); // prettier-ignore
  if (format === 'deepseek-native') throw badUsage(`${given} does not go together with --format ${format}`, { expected: 'safetensors, torch, gguf or onnx' }); // prettier-ignore
  if (fused.length === 0 || format === 'onnx') return;
  if (format === 'gguf') {
    throw badUsage('llama.cpp reads q, k, v and gate, up of these architectures apart', { got: given, expected: '--format onnx, safetensors or torch' }); // prettier-ignore
  }
  if (fused.length === 1) {
    throw badUsage('The container that engines read fused matrices from (Phi-3) has both kinds of them', {
      got: given,
      expected: '--fuse qkv,gate-up',
    });
  }
}

/** The checkpoint as if it had been stored otherwise: folded, split, or fused for the container that engines know. */
export function reshape(checkpoint: Checkpoint, fuse: ReadonlySet<Fuse>, format: OutputFormat): Reshaped {
  let [own, fusions, notes]: [Checkpoint, readonly Fusion[], readonly string[]] = [checkpoint, [], []];
  const apply = (step: (from: Checkpoint) => Reshaped): void => {
    const done = step(own);
    [own, fusions, notes] = [done.checkpoint, [...fusions, ...done.fusions], [...notes, ...done.notes]];
  };
  if (fuse.has('fold')) apply(foldFactors);
  if (fuse.has('split')) apply(splitPhi3);
  if (fuse.has('qkv') && format !== 'onnx') apply(fuseToPhi3);
  return { checkpoint: own, fusions, notes };
}
