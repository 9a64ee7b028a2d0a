/** Words in colours, or as they are where there are none. */
export type Paint = Readonly<Record<'bold' | 'dim' | 'red' | 'green' | 'yellow' | 'cyan', (text: string) => string>>;

/** Every word as it is. */
export const noPaint: Paint = (() => {
  const asIs = (text: string): string => text;
  return { bold: asIs, dim: asIs, red: asIs, green: asIs, yellow: asIs, cyan: asIs };
})();

/** Its library is loaded only where there are colours: programs that call this one mostly want none. */
export const createPaint = async (colored: boolean): Promise<Paint> =>
  colored ? new (await import('chalk')).Chalk({ level: 1 }) : noPaint;

/** Whether colours are asked for (FORCE_COLOR) or, on a terminal that has them, not refused (NO_COLOR). */
export function takesColors(
  stream: NodeJS.WriteStream,
  { NO_COLOR: no, FORCE_COLOR: force }: NodeJS.ProcessEnv,
): boolean {
  if (no !== undefined && no !== '') return false;
  if (force !== undefined) return force !== '0' && force !== 'false';
  return stream.isTTY === true && stream.hasColors();
}
