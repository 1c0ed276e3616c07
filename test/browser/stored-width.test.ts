/**
 * Codes of 3 and 6 bits and scales of 6 bits, stored at that width, in every build of onnxruntime-web: the runtime
 * unpacks them itself when it opens the file, and the logits are the plainly stored twin's, bit for bit.
 */
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { widened } from "../../quant/pack.ts";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { QuantizedModel } from "../../quant/quantized-model.ts";
import { rtn } from "../../quant/recipes.ts";
import { resolveModel } from "../../src/arch/index.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { fullKv } from "../../src/kv/full.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { repoPath } from "../helpers.ts";
import { noChromium, openPage, WEBGPU, withBrowser } from "./chromium.ts";
import { type Host, startHost } from "./host.ts";

/** SwiftShader compiles every shader on the CPU. */
const LIMIT_MS = 240_000;
const PROMPT = [1, 403, 407, 261, 378, 432, 383, 286, 261, 376];
/** A page that can import: a test runner rewrites import() in functions that are sent there. */
const PAGE = '<!doctype html><title>widths</title><script type="module">window.load = (url) => import(url);</script>';
declare const load: (url: string) => Promise<unknown>;

describe.skipIf(noChromium())("a file that stores 3-bit codes and 6-bit scales", () => {
  let folder: string;
  let host: Host;

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "nibble-widths-"));
    await writeFile(join(folder, "index.html"), PAGE);
    const checkpoint = await openHfFolder(nodeFolder(repoPath("models/stories260k")));
    const products = ortProducts(ort);
    const recipe = rtn({ bits: 3, groupSize: 16, scaleBits: 6, headBits: 6 });
    const stored = await quantizeModel(resolveModel(checkpoint), recipe, [], { ort, products });
    const plain = new QuantizedModel(stored.model, recipe);
    for (const [name, matrix] of stored.matrices)
      plain.setMatrix(name, { ...widened(await matrix.load()), scaleGrid: undefined });
    for (const [name, { model, weights }] of Object.entries({ stored, plain })) {
      const options = { weights, kv: fullKv(), maxPositions: 64, fuseLinears: true, scaleType: "float32" } as const;
      await writeFile(join(folder, `${name}.onnx`), await toBytes(decoderGraph(model, options)));
    }
    await products.dispose();
    await checkpoint.dispose();
    host = await startHost({ folders: { "/": folder, "/ort/": repoPath("node_modules/onnxruntime-web/dist") } });
  });
  afterAll(async () => {
    await host?.close();
    if (folder) await rm(folder, { recursive: true });
  });

  test.each([
    ["wasm", "wasm"],
    ["webgpu", "wasm"], // the asyncify build, which transformers.js takes
    ["webgpu", "webgpu"],
    ["jspi", "webgpu"],
  ])(
    "the %s build on %s gives the twin's logits",
    async (build, device) => {
      const [stored, plain] = await withBrowser(
        async (context) =>
          (await openPage(context, `${host.url}/`)).page.evaluate(
            async ({ build, device, prompt }) => {
              const runtime = (await load(`/ort/ort.${build}.bundle.min.mjs`)) as typeof ort;
              runtime.env.wasm.wasmPaths = "/ort/";
              runtime.env.wasm.numThreads = 1;
              runtime.env.logLevel = "error";
              const { Tensor, InferenceSession } = runtime;
              const int64 = (values: number[], dims: number[]) =>
                new Tensor("int64", BigInt64Array.from(values, BigInt), dims);
              const results: number[][] = [];
              for (const name of ["stored", "plain"]) {
                const session = await InferenceSession.create(`/${name}.onnx`, { executionProviders: [device] });
                const feeds: Record<string, ort.OnnxValue> = {
                  input_ids: int64(prompt, [1, prompt.length]),
                  attention_mask: int64(Array(prompt.length).fill(1), [1, prompt.length]),
                  num_logits_to_keep: int64([0], []),
                };
                for (const input of session.inputMetadata) {
                  if (!input.isTensor || !input.name.startsWith("past")) continue;
                  const dims = input.shape.map((dim, axis) => (typeof dim === "number" ? dim : axis === 0 ? 1 : 0));
                  feeds[input.name] = new Tensor("float32", new Float32Array(0), dims);
                }
                const { logits } = await session.run(feeds);
                results.push([...(logits.data as Float32Array)]);
                await session.release();
              }
              return results;
            },
            { build, device, prompt: PROMPT },
          ),
        { flags: device === "webgpu" ? WEBGPU : [], timeoutMs: LIMIT_MS },
      );
      expect(stored.length).toBe(PROMPT.length * 512);
      expect(stored).toEqual(plain);
    },
    LIMIT_MS,
  );
});
