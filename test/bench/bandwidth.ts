/** Bytes per second that so many threads read from memory together: the floor under every decode step. */
import koffi from "koffi";
import { collapsePages } from "../../src/node/huge-pages.ts";

/** Far beyond the caches. */
const SIZE_BYTES = 2 ** 28;
const PASSES = 10;

export interface Bandwidth {
  /** As memory comes from the system. */
  readonly usual: number;
  /** On huge pages, where there are some: the most that this machine reads. */
  readonly best: number;
}

/** The best of a few passes each. */
export async function readBandwidth(threads: number): Promise<Bandwidth> {
  const memory = new Uint8Array(SIZE_BYTES).fill(2);
  const usual = await bestPass(memory, threads);
  await collapsePages();
  return { usual, best: Math.max(usual, await bestPass(memory, threads)) };
}

async function bestPass(memory: Uint8Array, threads: number): Promise<number> {
  const memchr = koffi.load(null).func("void *memchr(void *, int, size_t)"); // reads all of it where nothing is found
  const start = BigInt(koffi.address(memory));
  const share = memory.length / threads;
  let best = 0;
  for (let pass = 0; pass < PASSES; pass++) {
    const startedAt = performance.now();
    const reads = Array.from(
      { length: threads },
      (_, i) => new Promise((resolve) => memchr.async(start + BigInt(i * share), 1, share, resolve)),
    );
    await Promise.all(reads);
    best = Math.max(best, memory.length / ((performance.now() - startedAt) / 1000));
  }
  return best;
}
