import { Chalk } from 'chalk';

/** Words in colours, or as they are where there are none. */
export type Paint = Readonly<Record<'bold' | 'dim' | 'red' | 'green' | 'yellow' | 'cyan', (text: string) => string>>;

/** `colored` false: every word as it is. */
export const createPaint = (colored: boolean): Paint => new Chalk({ level: colored ? 1 : 0 });

/** Whether colours are asked for (FORCE_COLOR) or, on a terminal that has them, not refused (NO_COLOR). */
export function takesColors(
  stream: NodeJS.WriteStream,
  { NO_COLOR: no, FORCE_COLOR: force }: NodeJS.ProcessEnv,
): boolean {
  if (no !== undefined && no !== '') return false;
  if (force !== undefined) return force !== '0' && force !== 'false';
  return stream.isTTY === true && stream.hasColors();
}
