import { open } from 'node:fs/promises';
import { badInput } from '../base/errors.js';
import { ioError, renameDurable } from '../base/files.js';
import type { Tensor } from '../tensor/tensor.js';

/**
 * Writes tensors one after another as they are in memory, behind all other transfers; the file has its name once it is
 * durable.
 */
export async function saveTensors(path: string, tensors: readonly Tensor[]): Promise<void> {
  const temporary = `${path}.tmp`;
  try {
    await using file = await open(temporary, 'w');
    let at = 0;
    for (const tensor of tensors) {
      if (tensor.bytes > 0)
        await tensor.device.writeFile(tensor.buffer, tensor.byteOffset, file.fd, at, tensor.bytes, true);
      at += tensor.bytes;
    }
    await file.sync();
  } catch (error) {
    throw ioError(error, 'write', temporary);
  }
  await renameDurable(temporary, path);
}

/** Fills tensors with what `saveTensors` wrote. Error: the file is not of their size. */
export async function loadTensors(path: string, tensors: readonly Tensor[]): Promise<void> {
  const expected = tensors.reduce((sum, { bytes }) => sum + bytes, 0);
  try {
    await using file = await open(path, 'r');
    const { size } = await file.stat();
    if (size !== expected) {
      throw badInput('The stored training state is damaged', {
        where: path,
        expected: `${expected} bytes`,
        got: `${size}`,
        hint: 'Begin anew with --restart.',
      });
    }
    // A read does not wait for what still runs: that could write here after it.
    for (const device of new Set(tensors.map((tensor) => tensor.device))) await device.sync();
    let at = 0;
    for (const tensor of tensors) {
      if (tensor.bytes > 0) await tensor.device.readFile(tensor.buffer, tensor.byteOffset, file.fd, at, tensor.bytes);
      at += tensor.bytes;
    }
  } catch (error) {
    throw ioError(error, 'read', path);
  }
}
