/** The worker that `createEngine` starts: bundlers find it by its address in index.ts. */
import { hostEngine } from "./host.ts";
import type { Port } from "./rpc.ts";

hostEngine(globalThis as unknown as Port);
