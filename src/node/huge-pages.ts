/**
 * Weights on huge pages, on Linux: ONNX Runtime keeps them in memory of 4 KB pages, and looking these up is what a token
 * waits for in a virtual machine. What is read, and by how much faster, is in `test/bench/engine.ts`'s bandwidth.
 *
 * The kernel is asked to put what is there onto pages of 2 MB (MADV_COLLAPSE, Linux 6.1); where it does not, nothing
 * changes. Only memory that is in use nearly whole is meant, so that the process does not grow.
 */
import { readFile } from "node:fs/promises";

/** The size on x86-64 and, with pages of 4 KB, on arm64. */
const HUGE_PAGE = 2n ** 21n;
const MADV_COLLAPSE = 25;
/** Of a mapping that has to be in memory. */
const SHARE_IN_USE = 0.9;

/** A range of addresses. */
export interface Mapping {
  readonly start: bigint;
  readonly end: bigint;
}

/** Private writable memory without a file, at least a huge page long and nearly all in use, from /proc/PID/smaps. */
export function mappingsInUse(smaps: string): Mapping[] {
  const mappings: Mapping[] = [];
  for (const entry of smaps.split(/\n(?=[\da-f]+-[\da-f]+ )/)) {
    const head = /^([\da-f]+)-([\da-f]+) rw-p \S+ \S+ 0[ \t]*(\[heap\]|\[anon\b.*)?$/m.exec(entry);
    const rss = /^Rss:\s+(\d+) kB$/m.exec(entry);
    if (!head || !rss) continue;
    const [start, end] = [BigInt(`0x${head[1]}`), BigInt(`0x${head[2]}`)];
    const [first, last] = [((start + HUGE_PAGE - 1n) / HUGE_PAGE) * HUGE_PAGE, (end / HUGE_PAGE) * HUGE_PAGE];
    if (last > first && Number(rss[1]) * 1024 >= SHARE_IN_USE * Number(end - start)) {
      mappings.push({ start: first, end: last });
    }
  }
  return mappings;
}

/**
 * Puts this process's memory onto huge pages where the system does that, on another thread; resolves to whether it was
 * asked to.
 */
export async function collapsePages(): Promise<boolean> {
  if (process.platform !== "linux") return false;
  const smaps = await readFile("/proc/self/smaps", "utf8").catch(() => "");
  const { default: koffi } = await import("koffi");
  const madvise = koffi.load(null).func("int madvise(void *, size_t, int)");
  for (const { start, end } of mappingsInUse(smaps)) {
    await new Promise((done) => madvise.async(start, end - start, MADV_COLLAPSE, done)); // seconds for gigabytes
  }
  return true;
}
