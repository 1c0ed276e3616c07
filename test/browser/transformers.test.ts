/** Stock @huggingface/transformers, in a page of its own, on the folder that Nibble exported. */
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import type { Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { DTYPES, engineTokens, makeStories } from "../fixtures/stories-dtypes.ts";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";
import { repoPath } from "../helpers.ts";
import { type Built, buildHarness, buildPage } from "./build.ts";
import { LIMIT_MS, noChromium, openPage, WEBGPU, withBrowser } from "./chromium.ts";
import type { Harness } from "./fixtures/harness.ts";
import { type Host, startHost } from "./host.ts";

declare const nibble: Harness;

const golden = JSON.parse(readFileSync(repoPath("models/stories260k/golden.json"), "utf8")) as {
  greedy_from_bos: { tokens: number[] };
};
const library = dirname(createRequire(import.meta.url).resolve("@huggingface/transformers"));
const itsOrt = dirname(createRequire(join(library, "index.js")).resolve("onnxruntime-web/wasm"));

interface Transformers {
  readonly env: {
    allowRemoteModels: boolean;
    allowLocalModels: boolean;
    localModelPath: string;
    readonly backends: { readonly onnx: { readonly wasm: { wasmPaths: unknown; numThreads: number } } };
  };
  readonly AutoModelForCausalLM: {
    from_pretrained(
      id: string,
      options: { device: string; dtype: string },
    ): Promise<{ generate(request: object): Promise<{ tolist(): bigint[][] }> }>;
  };
  readonly Tensor: new (type: string, data: BigInt64Array, dims: number[]) => object;
}

declare const transformers: Transformers;

/** Greedy tokens after `<s>`, by the library's own generate, with its default build. */
async function generate(page: Page, device: string, dtype: string, maxTokens: number): Promise<number[]> {
  await page.waitForFunction(() => "transformers" in globalThis);
  return page.evaluate(
    async ([where, type, count]) => {
      const { env, AutoModelForCausalLM, Tensor } = transformers;
      env.allowRemoteModels = false;
      env.allowLocalModels = true;
      env.localModelPath = "/models/";
      const file = (name: string) => new URL(`/its-ort/ort-wasm-simd-threaded.asyncify.${name}`, location.href).href;
      env.backends.onnx.wasm.wasmPaths = { mjs: file("mjs"), wasm: file("wasm") };
      env.backends.onnx.wasm.numThreads = 1;
      const model = await AutoModelForCausalLM.from_pretrained("stories", { device: where, dtype: type });
      const one = () => new Tensor("int64", BigInt64Array.of(1n), [1, 1]);
      const output = await model.generate({
        inputs: one(),
        attention_mask: one(),
        max_new_tokens: count,
        do_sample: false,
      });
      return output.tolist()[0].slice(1).map(Number);
    },
    [device, dtype, maxTokens] as const,
  );
}

describe.skipIf(noChromium())("stock transformers.js in a page", { timeout: LIMIT_MS + 30_000 }, () => {
  let pages: Record<"fp32" | "q4", Built>;
  let harness: Built;
  const hosts: Host[] = [];

  beforeAll(async () => {
    pages = { fp32: await buildPage("fp32"), q4: await buildPage("q4") };
    harness = await buildHarness();
  });
  afterAll(async () => {
    for (const host of hosts) await host.close();
    for (const built of [...Object.values(pages ?? {}), harness]) await built?.remove();
  });

  const hostModel = async (model: string, more: Record<string, string> = {}) => {
    const started = await startHost({
      folders: {
        "/": `${repoPath("test/browser/fixtures")}/`,
        "/transformers/": `${library}/`,
        "/its-ort/": `${itsOrt}/`,
        "/models/stories/": join(model, "/"),
        ...more,
      },
    });
    hosts.push(started);
    return started;
  };
  const host = (dtype: "fp32" | "q4") => {
    const model = join(pages[dtype].folder, "models/stories260k/");
    return hostModel(model, {
      "/harness/": harness.folder,
      "/ort/": join(pages[dtype].folder, "ort/"),
      "/model/": model,
    });
  };

  test("says the reference's tokens from the float export, on wasm", async () => {
    const { url } = await host("fp32");
    await withBrowser(async (context) => {
      const { page } = await openPage(context, `${url}/transformers.html`);
      expect(await generate(page, "wasm", "fp32", 64)).toEqual(golden.greedy_from_bos.tokens.slice(0, 64));
    });
  });

  test("says on wasm what Nibble says from the same 4-bit file as it is stored", async () => {
    const { url } = await host("q4");
    await withBrowser(async (context) => {
      const { page } = await openPage(context, `${url}/transformers.html`);
      const theirs = await generate(page, "wasm", "q4", 48);
      const { page: ours } = await openPage(context, `${url}/harness/harness.html`);
      const tokens = await ours.evaluate(async () => {
        const options = { startWorker: nibble.startWorker, device: "wasm", asStored: true, ortUrl: "/ort/" } as const;
        const engine = await nibble.createEngine("/model/", options);
        const ids: number[] = [];
        const greedy = { temperature: 0, maxTokens: 48 };
        for await (const piece of engine.generate({ kind: "ids", ids: [1] }, greedy)) ids.push(...piece.tokens);
        return ids;
      });
      expect(theirs).toEqual(tokens);
    });
  });

  test.each(DTYPES)("says from %s on wasm what Nibble says in Node", async (dtype) => {
    const model = temporaryFolder(dtype);
    await makeStories(dtype, model);
    const { url } = await hostModel(model);
    await withBrowser(async (context) => {
      const { page } = await openPage(context, `${url}/transformers.html`);
      expect(await generate(page, "wasm", dtype, 32)).toEqual(await engineTokens(model, 32));
    });
  });

  test.each([
    ["fp32", 8],
    ["q4", 8],
  ] as const)("says from %s on webgpu what the reference or Nibble says", async (dtype, count) => {
    const { url } = await host(dtype);
    const model = join(pages[dtype].folder, "models/stories260k/");
    await withBrowser(
      async (context) => {
        const { page } = await openPage(context, `${url}/transformers.html`);
        const expected =
          dtype === "fp32" ? golden.greedy_from_bos.tokens.slice(0, count) : await engineTokens(model, count);
        expect(await generate(page, "webgpu", dtype, count)).toEqual(expected);
      },
      { flags: WEBGPU },
    );
  });
});
