/** In a child process: whether onnxruntime-node's WebGPU provider finds an adapter here. */
import { ortFor, sessionOptions } from "./ort.ts";
import { probe } from "./probe-model.ts";

await probe(await ortFor("portable"), sessionOptions({ device: "webgpu" }));
