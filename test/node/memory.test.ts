import { describe, expect, test } from "vitest";
import { availableMemory, estimateMemory, formatBytes, requireMemory } from "../../src/node/memory.ts";

const files = (entries: Record<string, string>) => (path: string) => {
  if (!(path in entries)) throw new Error(`ENOENT ${path}`);
  return entries[path];
};
const meminfo = "MemTotal:       16000 kB\nMemFree:         100 kB\nMemAvailable:   8000 kB\n";

describe("availableMemory", () => {
  test("is MemAvailable where no cgroup limits it", () => {
    const read = files({
      "/proc/meminfo": meminfo,
      "/proc/self/cgroup": "0::/user.slice\n",
      "/sys/fs/cgroup/user.slice/memory.max": "max\n",
      "/sys/fs/cgroup/user.slice/memory.current": "5\n",
    });
    expect(availableMemory(read)).toBe(8000 * 1024);
  });

  test("is a cgroup's limit less its use, page cache counted as free", () => {
    const read = files({
      "/proc/meminfo": meminfo,
      "/proc/self/cgroup": "0::/\n",
      "/sys/fs/cgroup/memory.max": "1000000\n",
      "/sys/fs/cgroup/memory.current": "900000\n",
      "/sys/fs/cgroup/memory.stat": "anon 100\ninactive_file 300000\n",
    });
    expect(availableMemory(read)).toBe(400_000);
  });

  test("takes the tightest limit on the way up, in cgroup version 1 too", () => {
    const read = files({
      "/proc/meminfo": meminfo,
      "/proc/self/cgroup": "4:cpu:/a/b\n3:memory:/a/b\n",
      "/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712\n",
      "/sys/fs/cgroup/memory/a/b/memory.usage_in_bytes": "100\n",
      "/sys/fs/cgroup/memory/a/memory.limit_in_bytes": "5000\n",
      "/sys/fs/cgroup/memory/a/memory.usage_in_bytes": "2000\n",
    });
    expect(availableMemory(read)).toBe(3000);
  });
});

test("a model beyond the memory is refused with the context that fits", () => {
  const estimate = estimateMemory({ weightBytes: 1000, kvBytesPerToken: 10, contextLength: 500 }, 3000);
  expect(estimate).toMatchObject({ kvBytes: 5000, totalBytes: 6000, fits: false });
  expect(() => requireMemory("m", estimate)).toThrow(/--context 200/);
});

test("bytes read as people write them", () => {
  expect([0, 999, 1000, 86_300_000, 999_999_999].map(formatBytes)).toEqual([
    "0 B",
    "999 B",
    "1.0 kB",
    "86.3 MB",
    "1.0 GB",
  ]);
});
