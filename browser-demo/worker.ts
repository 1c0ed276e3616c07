/** The page's one worker: it owns the engine, and quantizes. */
import { hostEngine } from "../src/web/host.ts";
import type { Port } from "../src/web/rpc.ts";

hostEngine(globalThis as unknown as Port);
