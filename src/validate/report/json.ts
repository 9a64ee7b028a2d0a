import type { ValidateReport } from '../report.js';

/** The report object itself: one key a line down to its sections, numbers in arrays side by side. */
export function toJson(report: ValidateReport): string {
  return `${JSON.stringify(report, null, 1).replace(/\[\s+([^[\]{}"]*?)\s+\]/g, (_, items: string) => `[${items.replace(/\s+/g, ' ')}]`)}\n`;
}
