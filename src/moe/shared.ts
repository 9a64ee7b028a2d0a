/**
 * Neurons that every token uses: the `count` with the largest contributions, ties to the lower index. Both lists come in
 * ascending order.
 */
export function chooseShared(scores: Float32Array, count: number): { shared: Int32Array; rest: Int32Array } {
  const order = Int32Array.from(scores, (_, i) => i).sort((a, b) => scores[b]! - scores[a]! || a - b);
  return { shared: order.slice(0, count).sort(), rest: order.slice(count).sort() };
}

/** `n` neurons over `places` experts as evenly as can be: the first get one more. */
export function evenCapacities(n: number, places: number): Int32Array {
  return Int32Array.from({ length: places }, (_, e) => Math.floor(n / places) + (e < n % places ? 1 : 0));
}
