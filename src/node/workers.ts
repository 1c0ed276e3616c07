/**
 * Starts worker threads whose entry is a TypeScript file of this tree: as it stands in a clone and under vitest
 * (tsx compiles it), and as its JavaScript twin in `dist`.
 */
import { Worker, type WorkerOptions } from "node:worker_threads";

/** Source text that runs a module of this tree, given as for `startWorker`, in a thread or process of its own. */
export function moduleEntry(url: URL): string {
  if (!import.meta.url.endsWith(".ts")) return `import ${JSON.stringify(url.href.replace(/\.ts$/, ".js"))}`;
  // a worker does not take its parent's module hooks (Node 20), and `--import tsx` comes too late for its entry
  const entry = new URL("../../bin/typescript.js", import.meta.url);
  entry.searchParams.set("run", url.href);
  return `import ${JSON.stringify(entry.href)}`;
}

/** `url` is `new URL("./name.ts", import.meta.url)`: a `.ts` file beside the caller, in the clone and in `dist` alike. */
export function startWorker(url: URL, options: WorkerOptions = {}): Worker {
  if (!import.meta.url.endsWith(".ts")) return new Worker(new URL(url.href.replace(/\.ts$/, ".js")), options);
  // through a data: URL, since a worker's own file URL loses its query
  return new Worker(new URL(`data:text/javascript,${encodeURIComponent(moduleEntry(url))}`), options);
}
