import { once } from "node:events";
import { expect, test } from "vitest";
import { startWorker } from "../../src/node/workers.ts";

test("a worker written in TypeScript starts in a clone and imports the tree", async () => {
  const worker = startWorker(new URL("../fixtures/adding-worker.ts", import.meta.url));
  worker.postMessage([2, 3, 4]);
  const [count] = await once(worker, "message");
  await worker.terminate();
  expect(count).toBe(24);
});
