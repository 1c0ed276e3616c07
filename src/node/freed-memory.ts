/**
 * Memory that was freed goes back to the system, on Linux with glibc. Its malloc raises the size from which blocks are
 * mappings of their own to that of the largest block freed (at most 32 MB); below it they come out of heaps, and a heap
 * shrinks only from its end. Quantization holds windows of a few megabytes and larger passing results in turn, so half
 * of what the process took was holes: SmolLM2, 3 blocks, 32 windows: 679 MB, with this 532.
 */

/** malloc.h */
const M_MMAP_THRESHOLD = -3;
/** Mappings are whole pages and cost a system call; from here on neither matters. */
const THRESHOLD_BYTES = 2 ** 20;

let asked: Promise<boolean> | undefined;

/** Resolves to whether malloc was told; without koffi, or with another malloc, everything works as it did. */
export function returnFreedMemory(): Promise<boolean> {
  asked ??= tellMalloc();
  return asked;
}

async function tellMalloc(): Promise<boolean> {
  if (process.platform !== "linux") return false;
  try {
    const { default: koffi } = await import("koffi");
    return koffi.load(null).func("int mallopt(int, int)")(M_MMAP_THRESHOLD, THRESHOLD_BYTES) === 1;
  } catch {
    return false; // no koffi, or musl
  }
}
