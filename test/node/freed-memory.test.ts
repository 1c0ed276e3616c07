import { execFileSync } from "node:child_process";
import { expect, test } from "vitest";
import { repoPath } from "../helpers.ts";

/** Every second of a hundred blocks is freed, after malloc has seen a larger one go: resident bytes before and after. */
function holes(told: boolean): { readonly before: number; readonly after: number; readonly wasTold: boolean } {
  const script = `
    import { returnFreedMemory } from ${JSON.stringify(new URL("../../src/node/freed-memory.ts", import.meta.url).href)};
    const wasTold = ${told} && (await returnFreedMemory());
    const { default: koffi } = await import("koffi");
    const library = koffi.load(null);
    const take = library.func("void *malloc(size_t)");
    const clear = library.func("void *memset(void *, int, size_t)");
    const free = library.func("void free(void *)");
    free(take(30 * 2 ** 20));
    const blocks = Array.from({ length: 100 }, () => take(4 * 2 ** 20));
    for (const block of blocks) clear(block, 1, 4 * 2 ** 20);
    const before = process.memoryUsage.rss();
    blocks.forEach((block, i) => i % 2 === 0 && free(block));
    console.log(JSON.stringify({ before, after: process.memoryUsage.rss(), wasTold }));`;
  const args = ["--import", "tsx", "--input-type=module", "--eval", script];
  return JSON.parse(execFileSync(process.execPath, args, { encoding: "utf8", cwd: repoPath() }));
}

const isGlibc =
  process.platform === "linux" && "glibcVersionRuntime" in (process.report.getReport() as { header: object }).header;

test.skipIf(!isGlibc)("what is freed between blocks that stay is no longer resident", () => {
  const { before, after, wasTold } = holes(true);
  expect(wasTold).toBe(true);
  expect(before - after).toBeGreaterThan(190e6);
  const untold = holes(false);
  expect(untold.before - untold.after).toBeLessThan(20e6); // else there is nothing to tell malloc
});
