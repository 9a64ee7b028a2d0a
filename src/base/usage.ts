import { readFileSync } from 'node:fs';

/** What a process has used so far, in bytes; null where the system does not tell. */
export interface Usage {
  /** Largest resident memory. */
  readonly memory: number | null;
  /** Read by system calls, from the page cache too. */
  readonly read: number | null;
  readonly written: number | null;
}

/** Of a process of the same user (/proc); all null when it has ended. */
export function usageOf(pid: number | 'self'): Usage {
  const status = readProc(pid, 'status');
  const io = readProc(pid, 'io');
  const kilobytes = numberAfter(/^VmHWM:\s+(\d+) kB/m, status);
  return {
    memory: kilobytes === null ? null : kilobytes * 1024,
    read: numberAfter(/^rchar: (\d+)/m, io),
    written: numberAfter(/^wchar: (\d+)/m, io),
  };
}

function readProc(pid: number | 'self', name: string): string {
  try {
    return readFileSync(`/proc/${pid}/${name}`, 'utf8');
  } catch {
    return ''; // ended, or not ours to look at
  }
}

function numberAfter(pattern: RegExp, text: string): number | null {
  const found = pattern.exec(text)?.[1];
  return found === undefined ? null : Number(found);
}
