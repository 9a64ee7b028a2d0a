// Preloaded into the process under test (node --expose-gc --import): on SIGUSR2 it collects garbage and adds a line of
// what is left to the file SOAK_PROBE.
import { appendFileSync, readFileSync, readdirSync } from 'node:fs';

/** Memory and handles after garbage is gone. Memory that C++ gave back counts as gone too: glibc keeps some. */
export async function measure() {
  for (let i = 0; i < 4; i++) {
    globalThis.gc();
    await new Promise((done) => setTimeout(done, 50));
  }
  const status = readFileSync('/proc/self/status', 'utf8');
  return {
    rss: Number(/^VmRSS:\s+(\d+)/m.exec(status)[1]) * 1024,
    heap: process.memoryUsage().heapUsed,
    files: readdirSync('/proc/self/fd').length - 1, // but for the one that reads
    threads: Number(/^Threads:\s+(\d+)/m.exec(status)[1]),
  };
}

if (process.env.SOAK_PROBE !== undefined) {
  process.on('SIGUSR2', () => void measure().then((found) => appendFileSync(process.env.SOAK_PROBE, `${JSON.stringify(found)}\n`))); // prettier-ignore
}
