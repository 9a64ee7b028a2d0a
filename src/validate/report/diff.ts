/** A stretch of two texts: in both, or in one of them. */
export interface Span {
  readonly text: string;
  readonly same: boolean;
}

/** Words with the space before them; Han, kana and punctuation one by one. */
const pieces = (text: string): string[] =>
  text.match(/\s*(?:[\p{L}\p{N}_'](?<![\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]))+|\s*\S|\s+/gu) ?? [];

/** Both texts cut where they differ: a longest common subsequence of words. Very long ones count as a whole. */
export function diffWords(a: string, b: string): { readonly a: Span[]; readonly b: Span[] } {
  const [x, y] = [pieces(a), pieces(b)];
  if (x.length * y.length > 4e6) return { a: [{ text: a, same: a === b }], b: [{ text: b, same: a === b }] };
  const width = y.length + 1;
  const length = new Uint16Array((x.length + 1) * width);
  for (let i = x.length - 1; i >= 0; i--) {
    for (let j = y.length - 1; j >= 0; j--) {
      length[i * width + j] =
        x[i] === y[j]
          ? length[(i + 1) * width + j + 1]! + 1
          : Math.max(length[(i + 1) * width + j]!, length[i * width + j + 1]!);
    }
  }
  const out = { a: [] as { text: string; same: boolean }[], b: [] as { text: string; same: boolean }[] };
  const put = (side: 'a' | 'b', text: string, same: boolean): void => {
    const last = out[side].at(-1);
    if (last?.same === same) last.text += text;
    else out[side].push({ text, same });
  };
  let [i, j] = [0, 0];
  while (i < x.length || j < y.length) {
    if (i < x.length && j < y.length && x[i] === y[j]) {
      put('a', x[i++]!, true);
      put('b', y[j++]!, true);
    } else if (j >= y.length || (i < x.length && length[(i + 1) * width + j]! >= length[i * width + j + 1]!)) {
      put('a', x[i++]!, false);
    } else {
      put('b', y[j++]!, false);
    }
  }
  return out;
}
