import { inspect } from 'node:util';

const styles = ['bold', 'dim', 'red', 'green', 'yellow', 'cyan'] as const;

/** Words in colours, or as they are where there are none. */
export type Paint = Readonly<Record<(typeof styles)[number], (text: string) => string>>;

/** `colored` false: every word as it is. */
export function createPaint(colored: boolean): Paint {
  const wrap = (style: (typeof styles)[number]) => {
    const [open, close] = inspect.colors[style]!;
    return (text: string) => (colored && text !== '' ? `\u001b[${open}m${text}\u001b[${close}m` : text);
  };
  return Object.fromEntries(styles.map((style) => [style, wrap(style)])) as unknown as Paint;
}

/** Whether colours are asked for (FORCE_COLOR) or, on a terminal that has them, not refused (NO_COLOR). */
export function takesColors(
  stream: NodeJS.WriteStream,
  { NO_COLOR: no, FORCE_COLOR: force }: NodeJS.ProcessEnv,
): boolean {
  if (no !== undefined && no !== '') return false;
  if (force !== undefined) return force !== '0' && force !== 'false';
  return stream.isTTY === true && stream.hasColors();
}
