/**
 * What `promises` resolve to, when all of them have ended, also after a failure (the first is thrown then): memory and
 * files that they use are the caller's again.
 */
export async function allEnded<T extends readonly unknown[]>(promises: {
  readonly [K in keyof T]: Promise<T[K]>;
}): Promise<T> {
  await Promise.allSettled(promises);
  return await Promise.all(promises);
}
