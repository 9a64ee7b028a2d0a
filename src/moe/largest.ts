/** The K largest of each row of [T, N], best first, ties to the lower index: [T, min(K, N)]. */
export function largest(values: Float32Array, n: number, count: number): Int32Array {
  const k = Math.min(count, n);
  const rows = values.length / n;
  const idx = new Int32Array(rows * k);
  const best = new Float32Array(k);
  for (let t = 0; t < rows; t++) {
    const [row, out] = [t * n, t * k];
    let taken = 0;
    for (let i = 0; i < n; i++) {
      const value = values[row + i]!;
      if (taken === k && value <= best[k - 1]!) continue;
      let at = taken < k ? taken++ : k - 1;
      for (; at > 0 && best[at - 1]! < value; at--) {
        best[at] = best[at - 1]!;
        idx[out + at] = idx[out + at - 1]!;
      }
      best[at] = value;
      idx[out + at] = i;
    }
  }
  return idx;
}
