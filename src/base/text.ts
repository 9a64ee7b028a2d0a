/** `1234567` -> `1,234,567`. */
export const count = (n: number): string => String(n).replace(/\B(?=(\d{3})+$)/g, ',');

/** `6_120_000` -> `6.12 M`: parameters and tokens. */
export function short(n: number): string {
  const units = ['', ' K', ' M', ' B', ' T'];
  let [value, unit] = [n, 0];
  while (Math.abs(value) >= 999.5 && unit < units.length - 1) [value, unit] = [value / 1000, unit + 1];
  return unit === 0 ? String(n) : `${value >= 99.95 ? value.toFixed(0) : value.toPrecision(3)}${units[unit]}`;
}

/** Seconds -> `0.42 s`, `12.3 s`, `4 min 05 s`, `3 h 12 min`. */
export function duration(seconds: number): string {
  if (seconds < 1) return `${seconds.toFixed(2)} s`;
  if (seconds < 99.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const pad = (n: number) => String(n).padStart(2, '0');
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${pad(whole % 60)} s`;
  return `${Math.floor(whole / 3600)} h ${pad(Math.floor((whole % 3600) / 60))} min`;
}

/** Columns aligned by their widest cell: `l` left, `r` right. Two spaces between; no trailing spaces. */
export function columns(rows: readonly (readonly string[])[], align: string): string {
  const widths = [...align].map((_, c) => Math.max(0, ...rows.map((row) => displayWidth(row[c] ?? ''))));
  return rows
    .map((row) =>
      row
        .map((cell, c) => {
          const gap = ' '.repeat(Math.max(0, widths[c]! - displayWidth(cell)));
          return align[c] === 'r' ? gap + cell : cell + gap;
        })
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

/** Names and values below each other; values longer than the terminal go on below their beginning. */
export function factRows(rows: readonly (readonly [name: string, value: string])[], width: number): string {
  const indent = Math.max(0, ...rows.map(([name]) => displayWidth(name))) + 2;
  const wrapped = rows.flatMap(([name, value]) => wrap(value, Math.max(20, width - indent)).map((line, i) => [i === 0 ? name : '', line])); // prettier-ignore
  return columns(wrapped, 'll');
}

/** Lines of at most `width` columns, broken at spaces; longer words stand alone. */
export function wrap(text: string, width: number): string[] {
  const lines: string[] = [];
  let line = '';
  for (const word of text.split(' ')) {
    if (line !== '' && displayWidth(line) + 1 + displayWidth(word) > width) {
      lines.push(line);
      line = word;
    } else {
      line = line === '' ? word : `${line} ${word}`;
    }
  }
  return [...lines, line];
}

/**
 * Sentences broken at spaces where the terminal ends, below their own beginning. Tables and commands to copy stay as
 * they are.
 */
export function reflow(text: string, width: number): string {
  const fixed = (line: string) =>
    displayWidth(line) <= width || /\S {2,}\S/.test(line) || line.includes('deepseek-convert ');
  return text
    .split('\n')
    .flatMap((line) => {
      if (fixed(line)) return [line];
      const indent = /^ */.exec(line)![0];
      return wrap(line.slice(indent.length), Math.max(20, width - indent.length)).map((part) => indent + part);
    })
    .join('\n');
}

/** Colours take no room on the screen. */
const escapes = /\u001b\[[0-9;]*m/g;
/** East Asian characters take two columns. */
const wide = /[\u1100-\u115f\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe6f\uff00-\uff60\uffe0-\uffe6]/gu;

export function displayWidth(cell: string): number {
  const plain = cell.replace(escapes, '');
  return [...plain].length + (plain.match(wide)?.length ?? 0);
}

/** One argument as a POSIX shell would have to read it. */
export const shellQuote = (argument: string): string =>
  /^[\w@%+=:,./-]+$/.test(argument) ? argument : `'${argument.replaceAll("'", `'\\''`)}'`;
