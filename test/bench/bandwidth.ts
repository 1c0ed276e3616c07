/** Bytes per second that so many threads read from memory together: the floor under every decode step. */
import { Worker } from "node:worker_threads";

/** Far beyond the caches, and read one value of each cache line. */
const SIZE_BYTES = 2 ** 28;
const PASSES = 10;

const READER = `
const { parentPort, workerData } = require("node:worker_threads");
const data = new Float64Array(workerData);
parentPort.on("message", ([start, end]) => {
  let a = 0, b = 0, c = 0, d = 0;
  for (let i = start; i < end; i += 32) { a += data[i]; b += data[i + 8]; c += data[i + 16]; d += data[i + 24]; }
  parentPort.postMessage(a + b + c + d);
});`;

/** The best of a few passes. */
export async function readBandwidth(threads: number): Promise<number> {
  const memory = new SharedArrayBuffer(SIZE_BYTES);
  const values = new Float64Array(memory).fill(1).length;
  const workers = Array.from({ length: threads }, () => new Worker(READER, { eval: true, workerData: memory }));
  let best = 0;
  for (let pass = 0; pass < PASSES; pass++) {
    const start = performance.now();
    const parts = workers.map(
      (worker, i) =>
        new Promise((resolve) => {
          worker.once("message", resolve);
          worker.postMessage([(i * values) / threads, ((i + 1) * values) / threads]);
        }),
    );
    await Promise.all(parts);
    best = Math.max(best, SIZE_BYTES / ((performance.now() - start) / 1000));
  }
  await Promise.all(workers.map((worker) => worker.terminate()));
  return best;
}
