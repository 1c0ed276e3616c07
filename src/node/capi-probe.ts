/** In a child process: whether ONNX Runtime's C API can be called here. */
import { capiOrt } from "./capi.ts";
import { probe } from "./probe-model.ts";

for (const beside of [true, false]) await probe(await capiOrt(() => beside), { intraOpNumThreads: 1 });
