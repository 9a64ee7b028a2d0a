/**
 * What `promises` resolve to, when all of them have ended, also after a failure (the first is thrown then): memory and
 * files that they use are the caller's again.
 */
export async function allEnded<T>(promises: readonly Promise<T>[]): Promise<T[]> {
  const ends = await Promise.allSettled(promises);
  return ends.map((end) => {
    if (end.status === 'rejected') throw end.reason;
    return end.value;
  });
}
