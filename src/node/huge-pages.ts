/**
 * Weights on huge pages, on Linux: ONNX Runtime keeps them in memory of 4 KB pages, and looking these up is what a token
 * waits for in a virtual machine. What is read, and by how much faster, is in `test/bench/engine.ts`'s bandwidth.
 *
 * The kernel is asked to put what is there onto pages of 2 MB (MADV_COLLAPSE, Linux 6.1); where it does not, nothing
 * changes. Only memory that is in use nearly whole is meant, so that the process does not grow.
 */
import { readFile } from "node:fs/promises";
import { setTimeout } from "node:timers/promises";

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

/** Put onto huge pages at once: some 60 ms of a core. */
const PIECE = 8n * HUGE_PAGE;
/** What is computed meanwhile waits for no more than one piece in this time. */
const BUSY_PAUSE_MS = 500;
const LOOK_MS = 25;

export interface CollapseOptions {
  /** Whether something is computed that this would take a core from, as far as who asks knows. */
  readonly isBusy?: () => boolean;
  readonly signal?: AbortSignal;
}

/**
 * Puts this process's memory onto huge pages where the system does that, on another thread: 4 ms a megabyte, now where
 * nothing else is computed, else little by little. Resolves to whether the system was asked.
 */
export async function collapsePages({ isBusy = () => false, signal }: CollapseOptions = {}): Promise<boolean> {
  if (process.platform !== "linux") return false;
  const inUse = async () => mappingsInUse(await readFile("/proc/self/smaps", "utf8").catch(() => ""));
  const { default: koffi } = await import("koffi");
  const madvise = koffi.load(null).func("int madvise(void *, size_t, int)");
  for (const { start, end } of await inUse()) {
    // what was freed and is used anew meanwhile may be in use in part
    if (!(await inUse()).some((now) => now.start <= start && end <= now.end)) continue;
    for (let from = start; from < end; from += PIECE) {
      for (let waited = 0; isBusy() && waited < BUSY_PAUSE_MS; waited += LOOK_MS) await setTimeout(LOOK_MS);
      if (signal?.aborted) return true;
      const size = from + PIECE < end ? PIECE : end - from;
      await new Promise((done) => madvise.async(from, size, MADV_COLLAPSE, done));
    }
  }
  return true;
}
