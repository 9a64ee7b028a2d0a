import type { RandomAccess } from './source.js';

/** What torch.save has written over the years. */
export type TorchContainer = 'zip' | 'stream' | 'tar';

/** A legacy stream begins with this number, pickled. */
export const streamMagic = 0x1950a86a20f9469cfc6cn;
/** It as LONG1 (protocols 2 and up, perhaps behind PROTO and FRAME) and as LONG. */
const streamBytes = [Buffer.from('8a0a6cfc9c46f9206aa85019', 'hex'), Buffer.from(`L${streamMagic}L\n`)];
/** Members of the oldest form. */
export const tarNames = ['storages', 'tensors', 'pickle', 'sys_info'];

export const tarText = (field: Buffer): string => field.toString('latin1').replace(/\0.*$/s, '');

/** The form of a PyTorch file by its first bytes; undefined for other files. Apart from their readers: every file is asked. */
export function torchContainer(source: RandomAccess): TorchContainer | undefined {
  const { size } = source;
  const head = source.read(0, Math.min(512, size), 'magic');
  if (size >= 22 && head.readUInt32LE() === 0x04034b50) return 'zip';
  const isTar = size >= 1024 && head.toString('latin1', 257, 262) === 'ustar';
  if (isTar && tarNames.includes(tarText(head.subarray(0, 100)))) return 'tar';
  return streamBytes.some((bytes) => head.subarray(0, 32).includes(bytes)) && size >= 32 ? 'stream' : undefined;
}
