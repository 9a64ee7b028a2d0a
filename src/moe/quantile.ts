/** Inverse of the standard normal distribution function, by bisection on Abramowitz & Stegun 7.1.26. */
export function normalQuantile(p: number): number {
  const cdf = (x: number): number => {
    const t = 1 / (1 + (0.3275911 * Math.abs(x)) / Math.SQRT2);
    const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    const erf = 1 - tail * Math.exp((-x * x) / 2);
    return 0.5 * (1 + Math.sign(x) * erf);
  };
  let [low, high] = [-6, 6];
  for (let i = 0; i < 50; i++) {
    const middle = (low + high) / 2;
    if (cdf(middle) < p) low = middle;
    else high = middle;
  }
  return (low + high) / 2;
}
