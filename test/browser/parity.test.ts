/**
 * The parity gate: every operator of every graph that is exported gives on WASM and on WebGPU what it gives on Node's CPU
 * provider, within a tolerance of its own. Cases are cut out of the golden models' graphs, so a new operator has one at
 * once, and fails until it is named in parity/operators.ts.
 */
import { readFileSync } from "node:fs";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import * as ort from "onnxruntime-node";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ortProducts } from "../../quant/products.ts";
import { quantizeModel } from "../../quant/quantize.ts";
import { rtn } from "../../quant/recipes.ts";
import { type Model, resolveModel } from "../../src/arch/index.ts";
import { floatWeights, type Weights } from "../../src/arch/weights.ts";
import { openHfFolder } from "../../src/checkpoint/hf-folder.ts";
import { decoderGraph } from "../../src/export/graphs.ts";
import { EVICTION_POLICIES } from "../../src/kv/eviction.ts";
import { withEviction } from "../../src/kv/eviction-graph.ts";
import { fullKv } from "../../src/kv/full.ts";
import { withInt8Cache } from "../../src/kv/int8.ts";
import { nodeFolder } from "../../src/node/files.ts";
import { toBytes } from "../../src/onnx/external-data.ts";
import { decodeModel, encodeModel, type ModelProto } from "../../src/onnx/proto.ts";
import { openModel, readGolden, withConfig } from "../arch/golden-model.ts";
import { goldenModels, isMissing, repoPath, sharedPath } from "../helpers.ts";
import { noChromium, openPage, WEBGPU, withBrowser } from "./chromium.ts";
import { type Host, startHost } from "./host.ts";
import { tieredGraphs } from "./parity/caches.ts";
import { collectCases, collectFrom, type OperatorCase, runCase } from "./parity/cases.ts";
import { type CaseJson, type CaseOutcome, drive } from "./parity/drive.ts";
import { NOT_EXPORTED, PARITY } from "./parity/operators.ts";
import { branchesOf, integerTwin } from "./parity/twin.ts";

/** A prompt of seven tokens and a step. */
const TOKENS = 8;
const STORY = [1, 403, 407, 261, 378, 432, 383, 286];
/** SwiftShader compiles every shader on the CPU. */
const LIMIT_MS = 300_000;

const folders = goldenModels();
/** All families are there, so every line of the table has to be met. */
const complete = !isMissing(sharedPath("golden", "models"));

/** The golden models, and the one that ships: as it is, and with the one activation that no golden model has. */
async function* models(): AsyncGenerator<{ model: Model; ids: readonly number[] }> {
  for (const golden of folders.values()) {
    yield { model: await openModel(golden), ids: (await readGolden(golden)).inputIds.slice(0, TOKENS) };
  }
  for (const changes of [{}, { hidden_act: "relu" }]) {
    const checkpoint = await openHfFolder(nodeFolder(repoPath("models/stories260k")));
    yield { model: resolveModel(withConfig(checkpoint, changes)), ids: STORY };
  }
}

interface Exported {
  readonly bytes: Uint8Array;
  /** The graph takes one token a run. */
  readonly oneToken?: boolean;
}

/** The graphs that one model is exported as. */
async function* graphsOf(model: Model, products: ReturnType<typeof ortProducts>): AsyncGenerator<Exported> {
  const options = {
    kv: fullKv(),
    maxPositions: 64,
    accuracyLevel: 0,
    scaleType: "float16",
    fuseLinears: true,
  } as const;
  const graph = (weights: Weights, more: { result?: "hidden_states" } = {}) =>
    toBytes(decoderGraph(model, { ...options, ...more, weights }));
  yield { bytes: await graph(floatWeights(model.checkpoint)) };
  yield { bytes: await graph(floatWeights(model.checkpoint), { result: "hidden_states" }) };
  for (const bits of [2, 3, 4, 5, 6, 8]) {
    const recipe = rtn({ bits, symmetric: bits === 8 });
    const { weights } = await quantizeModel(model, recipe, [], { ort, products });
    const bytes = await graph(weights);
    yield { bytes };
    if (bits !== 4) continue;
    const { weights: small } = await quantizeModel(model, rtn({ bits, headBits: 4 }), [], { ort, products });
    yield { bytes: await graph(small) };
    const proto = decodeModel(bytes);
    const { anyTokens, oneToken } = branchesOf(await integerTwin(proto));
    yield { bytes: encodeModel(anyTokens) };
    if (oneToken) yield { bytes: encodeModel(oneToken), oneToken: true };
    if (model.config.modelType !== "llama") continue;
    yield { bytes: encodeModel(int8Cache(proto)) };
    for (const policy of EVICTION_POLICIES) yield { bytes: encodeModel(withEviction(proto, policy)) };
  }
}

function int8Cache(model: ModelProto): ModelProto {
  const sizes = model.graph.input
    .filter(({ name }) => name.endsWith(".key"))
    .map(({ type }) => type!.tensorType!.shape!.dim.map(({ dimValue }) => Number(dimValue ?? 0)));
  const scales = sizes.map(([, kvHeads, , headDim]) => {
    const one = new Float32Array(kvHeads * headDim).fill(0.02);
    return { key: one, value: one };
  });
  return withInt8Cache(model, scales);
}

/** Greatest difference, relative to the greatest value where that is above 1. */
function difference(type: ort.Tensor.Type, ours: Uint8Array, theirs: Uint8Array): number {
  if (ours.byteLength !== theirs.byteLength) return Number.POSITIVE_INFINITY;
  if (type !== "float32")
    return ours.every((byte, at) => byte === theirs[at]) ? 0 : wholeDifference(type, ours, theirs);
  const [a, b] = [ours, theirs].map((bytes) => new Float32Array(bytes.slice().buffer));
  let worst = 0;
  let largest = 1;
  for (let i = 0; i < a.length; i++) {
    const apart = Math.abs(a[i] - b[i]);
    worst = apart >= 0 ? Math.max(worst, apart) : Number.POSITIVE_INFINITY; // NaN
    largest = Math.max(largest, Math.abs(a[i]));
  }
  return worst / largest;
}

/** Codes may round to their neighbour: steps apart at most. */
function wholeDifference(type: ort.Tensor.Type, ours: Uint8Array, theirs: Uint8Array): number {
  if (type !== "uint8" && type !== "int8") return Number.POSITIVE_INFINITY;
  const codes = (bytes: Uint8Array) => Array.from(type === "int8" ? new Int8Array(bytes.slice().buffer) : bytes);
  const [a, b] = [codes(ours), codes(theirs)];
  return a.reduce((worst, code, at) => Math.max(worst, Math.abs(code - b[at])), 0);
}

const base64 = (bytes: Uint8Array) => Buffer.from(bytes).toString("base64");

/** A test runner rewrites import() in functions that are sent to a page. */
const PAGE = '<!doctype html><title>parity</title><script type="module">window.load = (url) => import(url);</script>';
declare const load: (url: string) => Promise<unknown>;

describe("every operator of an exported graph", { timeout: LIMIT_MS + 60_000 }, () => {
  const cases = new Map<string, OperatorCase>();
  let expected: ReadonlyMap<string, readonly ort.Tensor[]>;
  let folder: string;
  let host: Host;

  beforeAll(async () => {
    const products = ortProducts(ort);
    for await (const { model, ids } of models()) {
      for await (const { bytes, oneToken } of graphsOf(model, products)) {
        await collectCases(bytes, oneToken ? ids.slice(0, 2) : ids, cases); // the last id is a step
      }
      await model.checkpoint.dispose();
    }
    await products.dispose();
    for await (const { model, runs } of tieredGraphs()) await collectFrom(model, runs, cases);
    expected = new Map(await Promise.all(Array.from(cases, async ([key, one]) => [key, await runCase(one)] as const)));
    folder = await mkdtemp(join(tmpdir(), "nibble-parity-"));
    const json = Array.from(cases.values(), ({ model, feeds, outputs }): CaseJson => {
      const tensors = Object.entries(feeds).map(
        ([name, { type, dims, bytes }]) => [name, { type, dims, data: base64(bytes) }] as const,
      );
      return { model: base64(model), feeds: Object.fromEntries(tensors), outputs };
    });
    await writeFile(join(folder, "cases.json"), JSON.stringify(json));
    await writeFile(join(folder, "index.html"), PAGE);
    await writeFile(join(folder, "drive.mjs"), `export ${drive}`);
    host = await startHost({ folders: { "/": folder, "/ort/": repoPath("node_modules/onnxruntime-web/dist") } });
  }, LIMIT_MS);
  afterAll(async () => {
    await host?.close();
    if (folder) await rm(folder, { recursive: true });
  });

  test("has a tolerance of its own, and the table names no other", () => {
    const met = new Set([...cases.values()].map(({ opType }) => opType));
    expect([...met].filter((opType) => !(opType in PARITY))).toEqual([]);
    if (complete) expect(Object.keys(PARITY).filter((opType) => !met.has(opType))).toEqual([]);
  });

  test("stands in ops.ts beside those that are named as never exported", () => {
    const source = readFileSync(repoPath("src/onnx/ops.ts"), "utf8");
    const written = [...source.matchAll(/(?:\.node\(\s*|elementwise\(|unary\()"(\w+)"/g)].map(([, opType]) => opType);
    expect(written.length).toBeGreaterThan(40);
    expect(written.filter((opType) => !(opType in PARITY) && !(opType in NOT_EXPORTED))).toEqual([]);
    expect(Object.keys(NOT_EXPORTED).filter((opType) => opType in PARITY)).toEqual([]);
  });

  describe.skipIf(noChromium())("in Chromium", () => {
    const builds = { wasm: "ort.wasm.bundle.min.mjs", webgpu: "ort.jspi.bundle.min.mjs" } as const;

    test.each(["wasm", "webgpu"] as const)("gives on %s what it gives in Node", async (device) => {
      const outcomes = await withBrowser(
        async (context) => {
          const { page } = await openPage(context, `${host.url}/`);
          return page.evaluate(
            async ([provider, build]) => {
              const runtime = (await load(`/ort/${build}`)) as typeof ort;
              const { drive: run } = (await load("/drive.mjs")) as { drive: typeof drive };
              runtime.env.wasm.wasmPaths = "/ort/";
              runtime.env.wasm.numThreads = 1;
              runtime.env.logLevel = "error";
              return run(runtime, provider, await (await fetch("/cases.json")).json());
            },
            [device, builds[device]] as const,
          );
        },
        { flags: device === "webgpu" ? WEBGPU : [], timeoutMs: LIMIT_MS },
      );
      const worst = new Map<string, number>();
      const complaints: string[] = [];
      for (const [at, { key, opType }] of [...cases.values()].entries()) {
        const line = PARITY[opType];
        if (!line) continue; // the first test says so
        const refusal = line.refused?.find(({ on, match }) => on === device && match.test(key));
        const found = outcomeOf(outcomes[at], expected.get(key)!);
        if (refusal) {
          if (found !== "refused") complaints.push(`${key}: ${device} runs it now; take it off the table`);
        } else if (found === "refused") {
          complaints.push(`${key}: ${(outcomes[at] as { error: string }).error}`);
        } else {
          worst.set(opType, Math.max(worst.get(opType) ?? 0, found));
          if (!(found <= line.tolerance)) complaints.push(`${key}: ${found} apart, ${line.tolerance} is allowed`);
        }
      }
      if (process.env.NIBBLE_PARITY) console.log(device, Object.fromEntries(worst));
      expect(complaints).toEqual([]);
      expect(outcomes.length).toBe(cases.size);
    });
  });
});

function outcomeOf(outcome: CaseOutcome, expected: readonly ort.Tensor[]): number | "refused" {
  if ("error" in outcome) return "refused";
  const apart = expected.map(({ type, data }, at) => {
    const { buffer, byteOffset, byteLength } = data as Uint8Array;
    const theirs = new Uint8Array(Buffer.from(outcome.outputs[at].data, "base64"));
    return difference(type, new Uint8Array(buffer, byteOffset, byteLength), theirs);
  });
  return Math.max(...apart);
}
