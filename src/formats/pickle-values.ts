import { badInput } from '../base/errors.js';
import type { ConvertError } from '../base/errors.js';

export class PyTuple {
  constructor(readonly items: readonly PyValue[]) {}
}

/** A name that the pickle refers to. It is a label here: nothing is imported. */
export class PyGlobal {
  constructor(
    readonly module: string,
    readonly name: string,
  ) {}

  toString(): string {
    return `${this.module}.${this.name}`;
  }
}

/** What a call in the pickle would have made; nothing was called. */
export class PyObject {
  constructor(
    readonly callee: PyGlobal,
    readonly args: readonly PyValue[],
  ) {}
}

export type PyDict = Map<PyValue, PyValue>;
export type PyValue =
  | null
  | boolean
  | number
  | bigint
  | string
  | Uint8Array
  | PyTuple
  | PyGlobal
  | PyObject
  | PyDict
  | Set<PyValue>
  | PyValue[];

/** A global outside the allow-list. */
export interface RefusedGlobal {
  readonly name: string;
  /** Byte of the opcode that names it. */
  readonly position: number;
}

/** The refusal of a pickle that names what is not on the allow-list. */
export function refusedGlobals(refused: readonly RefusedGlobal[], path: string): ConvertError {
  const names = [...new Set(refused.map(({ name }) => name))];
  const got = names.length > 8 ? `${names.slice(0, 8).join(', ')} and ${names.length - 8} more` : names.join(', ');
  return badInput('The file refers to code outside the allow-list; nothing of it was run', {
    where: `${path}, byte ${refused[0]!.position}`,
    expected: 'tensors, dictionaries and plain values',
    got,
    hint:
      'deepseek-convert inspect --security lists what was refused. If the file is yours, save the weights alone: ' +
      'torch.save(model.state_dict(), path).',
  });
}
