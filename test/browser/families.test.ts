/**
 * One model of each structural kind, at 4 bits, in Chromium on WASM and on WebGPU (SwiftShader): a prompt and two steps
 * with the cache give the logits of the model's own dequantized weights in Node.
 */
import { existsSync } from "node:fs";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import type { Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { rtn } from "../../quant/recipes.ts";
import type { Weights } from "../../src/arch/weights.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { fullKv } from "../../src/kv/full.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { maxDifference, openModel, readGolden } from "../arch/golden-model.ts";
import { repoPath, sharedPath } from "../helpers.ts";
import { noChromium, openPage, WEBGPU, withBrowser } from "./chromium.ts";
import { type Host, startHost } from "./host.ts";

const PROMPT = 14; // beyond Gemma 2's window of 12
const STEPS = 2;
/** golden/models/README.md: for a graph that a runtime fuses. */
const TOLERANCE = 1e-3;
/** SwiftShader compiles every shader on the CPU. */
const LIMIT_MS = 240_000;

/** What makes each of them a kind of its own. */
const KINDS: Readonly<Record<string, string>> = {
  "qwen2-yarn": "biases, rotary inside attention",
  "gemma3-layertypes": "head norms, windows, two rotary bases",
  phi: "attention and MLP side by side, partial rotary, head bias",
  olmoe: "mixture of experts",
  gemma2: "score and logit caps, windows",
  gpt2: "learned positions, LayerNorm",
  gpt_neox: "fused qkv cut by heads",
  granite: "multipliers",
  lfm2: "convolution states",
  olmo2: "norms after, q/k norm over all heads",
  "phi3-longrope": "rotary outside attention, two tables",
  qwen2_moe: "shared expert",
  smollm3: "layers without rotary",
  stablelm: "LayerNorm with SwiGLU",
};
const committed = (name: string) => repoPath("test", "golden", "models", name);
const folderOf = (name: string) =>
  existsSync(committed(name)) ? committed(name) : sharedPath("golden", "models", name);
const present = Object.keys(KINDS).filter((name) => existsSync(folderOf(name)));
const absent = Object.keys(KINDS).filter((name) => !existsSync(folderOf(name)));
if (absent.length > 0) test.skip(`${absent.join(", ")} (they need NIBBLE_SHARED)`, () => {});

interface Case {
  readonly ids: readonly number[];
  /** Of the prompt's last row and of every step, one after the other. */
  readonly logits: Float32Array;
}

/** A page that can import: a test runner rewrites import() in functions that are sent there. */
const PAGE = '<!doctype html><title>families</title><script type="module">window.load = (url) => import(url);</script>';
declare const load: (url: string) => Promise<unknown>;
type Drive = typeof drive;

/** Feeds a graph a prompt and steps; the same source runs in Node and, written to drive.mjs, in the page. */
async function drive(
  runtime: { Tensor: typeof ort.Tensor },
  session: ort.InferenceSession,
  ids: readonly number[],
  steps: number,
): Promise<number[]> {
  const logits: number[] = [];
  let past: ort.InferenceSession.OnnxValueMapType = {};
  for (let done = 0; done < ids.length; ) {
    const count = done === 0 ? ids.length - steps : 1;
    const int64 = (values: readonly number[], dims: number[]) =>
      new runtime.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
    const feeds: Record<string, ort.OnnxValue> = {
      input_ids: int64(ids.slice(done, done + count), [1, count]),
      attention_mask: int64(Array(done + count).fill(1), [1, done + count]),
      num_logits_to_keep: int64([1], []),
    };
    for (const input of session.inputMetadata) {
      if (!input.isTensor || !input.name.startsWith("past")) continue;
      const dims = input.shape.map((dim, axis) => (typeof dim === "number" ? dim : axis === 0 ? 1 : 0));
      const before = past[input.name.replace("past_key_values", "present").replace("past_conv", "present_conv")];
      feeds[input.name] = before ?? new runtime.Tensor("float32", new Float32Array(dims.reduce((a, b) => a * b)), dims);
    }
    past = await session.run(feeds);
    logits.push(...((past.logits as ort.Tensor).data as Float32Array));
    done += count;
  }
  return logits;
}

describe.skipIf(noChromium())("every structural kind in Chromium", () => {
  let folder: string;
  let host: Host;
  const cases = new Map<string, Case>();

  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), "nibble-families-"));
    await writeFile(join(folder, "index.html"), PAGE);
    await writeFile(join(folder, "drive.mjs"), `export ${drive}`);
    const products = ortProducts(ort);
    for (const name of present) {
      const model = await openModel(folderOf(name));
      const quantized = await quantizeModel(model, rtn(), [], { ort, products });
      const graphOf = (weights: Weights) =>
        toBytes(decoderGraph(model, { weights, kv: fullKv(), maxPositions: 64, accuracyLevel: 0, fuseLinears: true }));
      await writeFile(join(folder, `${name}.onnx`), await graphOf(quantized.weights));
      const reference = await ort.InferenceSession.create(await graphOf(quantized.dequantized));
      const ids = (await readGolden(folderOf(name))).inputIds.slice(0, PROMPT + STEPS);
      cases.set(name, { ids, logits: Float32Array.from(await drive(ort, reference, ids, STEPS)) });
      await reference.release();
      await model.checkpoint.dispose();
    }
    await products.dispose();
    host = await startHost({ folders: { "/": folder, "/ort/": repoPath("node_modules/onnxruntime-web/dist") } });
  });
  afterAll(async () => {
    await host?.close();
    if (folder) await rm(folder, { recursive: true });
  });

  /** Logits of one model in the page. */
  const inPage = (page: Page, device: "wasm" | "webgpu", name: string): Promise<number[]> =>
    page.evaluate(
      async ({ device, name, ids, steps }) => {
        const build = device === "wasm" ? "wasm" : "jspi";
        const runtime = (await load(`/ort/ort.${build}.bundle.min.mjs`)) as typeof ort;
        const { drive } = (await load("/drive.mjs")) as { drive: Drive };
        runtime.env.wasm.wasmPaths = "/ort/";
        runtime.env.wasm.numThreads = 1;
        runtime.env.logLevel = "error";
        const session = await runtime.InferenceSession.create(`/${name}.onnx`, { executionProviders: [device] });
        const logits = await drive(runtime, session, ids, steps);
        await session.release();
        return logits;
      },
      { device, name, ids: cases.get(name)!.ids, steps: STEPS },
    );

  for (const device of ["wasm", "webgpu"] as const) {
    test.each(present.map((name) => [name, KINDS[name]]))(
      `${device}: %s (%s)`,
      async (name) => {
        const { logits } = cases.get(name)!;
        const ours = await withBrowser(
          async (context) => inPage((await openPage(context, `${host.url}/`)).page, device, name),
          { flags: device === "webgpu" ? WEBGPU : [], timeoutMs: LIMIT_MS },
        );
        expect(maxDifference(ours, logits)).toBeLessThan(TOLERANCE);
      },
      LIMIT_MS,
    );
  }
});
