/** In a child process: whether ONNX Runtime's C API can be called here. */
import { capiOrt } from "./capi.ts";
import { probe } from "./probe-model.ts";

await probe(await capiOrt(), { intraOpNumThreads: 1 });
