import { readFileSync } from "node:fs";
import { expect, test } from "vitest";
import { collapsePages, mappingsInUse } from "../../src/node/huge-pages.ts";

const entry = (head: string, sizeKb: number, rssKb: number) =>
  `${head}\nSize:${String(sizeKb).padStart(15)} kB\nKernelPageSize:        4 kB\nRss:${String(rssKb).padStart(16)} kB\nAnonHugePages:         0 kB\n`;

test("only private memory without a file that is in use nearly whole is meant, by whole huge pages", () => {
  const smaps = [
    entry("00400000-00b6f000 rw-p 00000000 fe:00 247580                             /usr/bin/node", 7612, 7612),
    entry("130ab000-13aaf000 rw-p 00000000 00:00 0                                  [heap]", 10256, 10008),
    entry("7fbef8000000-7fbefa3a9000 rw-p 00000000 00:00 0 ", 36516, 36516),
    entry("7fbefb000000-7fbefc000000 rw-p 00000000 00:00 0 ", 16384, 3000), // a stack
    entry("7fbefd000000-7fbefe000000 r--p 00000000 00:00 0 ", 16384, 16384),
    entry("7fbeff1ff000-7fbeff3fe000 rw-p 00000000 00:00 0 ", 2044, 2044), // no whole page in it
    entry("7fbf00001000-7fbf00401000 rw-p 00000000 00:00 0                          [anon: weights]", 4096, 4096),
  ].join("");
  expect(mappingsInUse(smaps)).toEqual([
    { start: 0x13200000n, end: 0x13a00000n },
    { start: 0x7fbef8000000n, end: 0x7fbefa200000n },
    { start: 0x7fbf00200000n, end: 0x7fbf00400000n },
  ]);
});

test.skipIf(process.platform !== "linux")("what memory holds is the same on other pages", async () => {
  // 256 MB: what the kernel joins to it (stacks, hardly in use) does not matter beside them. Filled in place: a second
  // array, made and left untouched, would be joined to it as well
  const values = new Float64Array(2 ** 25);
  for (let i = 0; i < values.length; i++) values[i] = i;
  expect(mappingsInUse(readFileSync("/proc/self/smaps", "utf8"))).not.toEqual([]);
  expect(await collapsePages({ isBusy: () => true, signal: AbortSignal.abort() })).toBe(true); // waits, then leaves
  let looks = 0;
  expect(await collapsePages({ isBusy: () => ++looks % 2 === 1 })).toBe(true);
  expect(looks).toBeGreaterThan(1);
  expect(values.every((value, i) => value === i)).toBe(true);
});
