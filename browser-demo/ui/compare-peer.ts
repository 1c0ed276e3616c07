/** Compare's third column: stock @huggingface/transformers on A's folder. */
import { mostThreads } from "../../src/web/device.ts";
import { Client } from "../../src/web/rpc.ts";
import { device } from "../app.ts";
import type { PeerMethods } from "../protocol.ts";
import { type AnswerBox, answerBox, type Result, speed } from "./answer-box.ts";
import { el } from "./dom.ts";
import { milliseconds } from "./format.ts";

export interface PeerSide {
  readonly element: HTMLElement;
  readonly box: AnswerBox;
  /** @param file the graph that A ran; of graphs with other caches the one that they are made from. */
  run(id: string, file: string, prompt: string, maxTokens: number, signal: AbortSignal): Promise<Result>;
}

const peersUrl = new URL("peers/", document.baseURI).href;

export function peerSide(): PeerSide {
  const box = answerBox("Answer of transformers.js");
  return {
    element: el(
      "div",
      { class: "side" },
      el("h2", {}, "transformers.js"),
      el("p", { class: "hint" }, "On A's files, WASM"),
      box.text,
      box.facts,
    ),
    box,
    async run(id, file, prompt, maxTokens, signal) {
      box.show([["State", "loading"]]);
      const worker = new Worker(new URL("../transformers-worker.ts", import.meta.url), { type: "module" });
      const client = new Client<PeerMethods>(worker);
      // The library cannot be stopped inside a step: its worker is.
      const stop = () => {
        worker.terminate();
        client.fail(new DOMException("Stopped.", "AbortError") as never);
      };
      signal.addEventListener("abort", stop, { once: true });
      const threads = device.value ? mostThreads(device.value) : 1;
      try {
        const graph = file.replace(/(\.[^/.]+)?\.onnx$/, ".onnx");
        const request = { id, graph, prompt, maxTokens, threads, peersUrl };
        const onEvent = (said: string) => (box.text.textContent = said);
        const { ids, texts, loadMs, firstTokenMs, decodeMs } = await client.call("answer", request, { onEvent });
        const text = texts.at(-1) ?? "";
        box.text.textContent = text;
        box.show([
          ["Speed", speed(ids.length, decodeMs)],
          ["First token", milliseconds(firstTokenMs)],
          ["Load", milliseconds(loadMs)],
          ["Runs on", `WASM, ${threads === 1 ? "1 thread" : `${threads} threads`}, weights as stored`],
        ]);
        return { ids, ends: texts.map(({ length }) => length), text };
      } catch (error) {
        box.show([["Failed", (error as Error).message]]);
        throw error;
      } finally {
        signal.removeEventListener("abort", stop);
        worker.terminate();
      }
    },
  };
}
