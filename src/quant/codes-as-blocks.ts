import { blockCodes, blockFormats, cast, copyInto, type BlockFormatName } from '../tensor/ops.js';
import { Tensor, type Scope } from '../tensor/tensor.js';
import type { Coded } from './rtn.js';
import type { Scheme } from './scheme.js';

/**
 * Codes of a symmetric 4-bit grid as Q4_0 blocks u8 [N, bytes]: w = d (q - 8) is the same formula, with one fp16 scale
 * for 32 columns; larger groups repeat theirs. Undefined: the type cannot say these codes.
 */
export function blocksOfCodes(
  scope: Scope,
  type: BlockFormatName,
  scheme: Scheme,
  { codes, grid }: Coded,
): Tensor | undefined {
  const { values, bytes } = blockFormats.q4_0;
  const [n, k] = codes.shape as [number, number];
  const group = scheme.group === 0 ? k : scheme.group;
  const fits = type === 'q4_0' && scheme.bits === 4 && scheme.symmetric && scheme.order !== 'group';
  if (!fits || scheme.blocks !== undefined || group % values !== 0 || k % values !== 0) return undefined;
  const blocks = scope.empty('u8', [n, (k / values) * bytes]);
  const scale = cast(scope, grid.scale, 'f16');
  const groups = scale.dim(1);
  const repeats = group / values;
  const row = blocks.dim(1);
  const from = new Tensor(scale.storage, scale.byteOffset, 'u8', [n, groups, 1, 2], [2 * groups, 2, 0, 1]);
  const into = new Tensor(
    blocks.storage,
    blocks.byteOffset,
    'u8',
    [n, groups, repeats, 2],
    [row, repeats * bytes, bytes, 1],
  );
  copyInto(into, from.expand(n, groups, repeats, 2));
  blockCodes(blocks, codes, type);
  return blocks;
}
