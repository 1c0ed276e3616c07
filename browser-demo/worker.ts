/** The page's worker: it owns an engine, or quantizes. */
import { hostEngine } from "../src/web/host.ts";
import type { Port } from "../src/web/rpc.ts";
import { quantizeHere } from "./quantize-job.ts";

hostEngine(globalThis as unknown as Port, { quantize: quantizeHere });
