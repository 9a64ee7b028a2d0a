import { expect } from 'vitest';
import { ConvertError } from '../../src/base/errors.js';

/** The ConvertError that `action` must end with; anything else fails the test. */
export async function refusal(action: Promise<unknown> | (() => unknown)): Promise<ConvertError> {
  let error: unknown;
  try {
    await (typeof action === 'function' ? action() : action);
  } catch (reason) {
    error = reason;
  }
  if (error instanceof Error && !(error instanceof ConvertError)) throw error;
  expect(error, 'should have been refused').toBeInstanceOf(ConvertError);
  return error as ConvertError;
}

/** The same for what must be refused as bad input, at once. */
export async function badInputMessage(action: Promise<unknown> | (() => unknown)): Promise<string> {
  const error = await refusal(action);
  expect(error.kind).toBe('input');
  return error.message;
}
