/** Two models, devices or KV caches on one prompt: what each says, how fast, and where they part. */

import { EngineWorker } from "../../src/web/client.ts";
import type { DeviceWish } from "../../src/web/device.ts";
import type { LoadedModel } from "../../src/web/protocol.ts";
import { samplingOf } from "../answer.ts";
import { engine, ortUrl, startWorker, stored } from "../app.ts";
import { settings } from "../settings.ts";
import { announce, el, icon } from "./dom.ts";
import { bytes, milliseconds, rate } from "./format.ts";

interface Result {
  readonly ids: readonly number[];
  /** Text after each id, so that the text up to a token is known. */
  readonly ends: readonly number[];
  readonly text: string;
}

interface Side {
  readonly element: HTMLElement;
  run(prompt: string, signal: AbortSignal): Promise<Result>;
  /** Underlines from the first character that the other side does not say. */
  mark(result: Result, from: number): void;
  clear(): void;
}

const devices: Readonly<Record<string, { text: string; device: DeviceWish; asStored?: boolean }>> = {
  auto: { text: "Best device", device: "auto" },
  wasm: { text: "WASM", device: "wasm" },
  stored: { text: "WASM, weights as stored", device: "wasm", asStored: true },
  webgpu: { text: "WebGPU", device: "webgpu" },
};

function select<T extends string>(label: string, options: ReadonlyMap<T, string>): HTMLSelectElement {
  const element = el("select", { aria: { label } });
  element.append(...Array.from(options, ([value, text]) => el("option", { value }, text)));
  return element;
}

function side(letter: string): Side {
  const model = select(`Model ${letter}`, new Map());
  const device = select(
    `Device ${letter}`,
    new Map(Object.entries(devices).map(([key, { text }]) => [key, text] as const)),
  );
  const graph = select(`Graph ${letter}`, new Map([["", "Its own graph"]]));
  const text = el("div", { class: "answer", role: "region", tabIndex: 0, aria: { label: `Answer ${letter}` } });
  const facts = el("dl", { class: "facts numbers" });

  const graphs = async () => {
    const stem = (path: string) => path.replace(/^onnx\/|\.onnx$/g, "");
    const found = model.value ? await engine.rpc.call("graphs", model.value).catch(() => []) : [];
    const options = found.map((path) => el("option", { value: path }, stem(path)));
    graph.replaceChildren(el("option", { value: "" }, "Its own graph"), ...options);
  };
  model.addEventListener("change", () => void graphs());
  stored.watch((models) => {
    const before = model.value;
    const complete = models.filter((one) => one.complete);
    model.replaceChildren(...complete.map(({ id }) => el("option", { value: id }, id)));
    if (complete.length === 0) model.append(el("option", { value: "" }, "No model stored yet"));
    if (complete.some(({ id }) => id === before)) model.value = before;
    else void graphs();
  });

  const show = (rows: readonly (readonly [string, string])[]) =>
    facts.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)]));

  return {
    element: el(
      "div",
      { class: "side" },
      el("h2", {}, letter),
      model,
      el("div", { class: "grid-2" }, device, graph),
      text,
      facts,
    ),
    async run(prompt, signal) {
      // A worker of its own, ended afterwards: the two sides share no memory, build or cache.
      const worker = new EngineWorker(startWorker);
      try {
        show([["State", "loading"]]);
        const source = { kind: "stored", id: model.value } as const;
        const { device: wish, asStored } = devices[device.value];
        const request = { source, device: wish, asStored, graph: graph.value || undefined, ortUrl };
        const loaded = await worker.load(request, { signal });
        return await say(worker, loaded, prompt, signal);
      } catch (error) {
        show([["Failed", (error as Error).message]]);
        throw error;
      } finally {
        worker.terminate();
      }
    },
    mark({ text: said }, from) {
      text.replaceChildren(said.slice(0, from));
      if (from < said.length) text.append(el("mark", {}, said.slice(from)));
    },
    clear() {
      text.replaceChildren();
      facts.replaceChildren();
    },
  };

  async function say(worker: EngineWorker, loaded: LoadedModel, prompt: string, signal: AbortSignal): Promise<Result> {
    const ids: number[] = [];
    const ends: number[] = [];
    let said = "";
    const started = performance.now();
    let first = 0;
    const options = { ...samplingOf(settings.value), temperature: 0, repetitionPenalty: 1, maxTokens: 64, signal };
    const input = loaded.hasChatTemplate
      ? ({ kind: "chat", messages: [{ role: "user", content: prompt }] } as const)
      : ({ kind: "text", text: prompt } as const);
    for await (const piece of worker.generate(input, options)) {
      first ||= performance.now();
      said += piece.text;
      for (const id of piece.tokens) {
        ids.push(id);
        ends.push(said.length);
      }
      text.textContent = said;
    }
    const decodeMs = performance.now() - first;
    show([
      ["Speed", `${rate(((ids.length - 1) * 1000) / decodeMs)} tok/s`],
      ["First token", milliseconds(first - started)],
      ["Load", milliseconds(loaded.loadMs)],
      ["Weights", bytes(loaded.info.memory.weightBytes)],
      [
        "KV cache",
        `${loaded.info.kv.format} ${loaded.info.kv.policy}, ${bytes(loaded.info.memory.kvBytesPerToken)} a token`,
      ],
      ["Runs on", loaded.choice.reason],
    ]);
    return { ids, ends, text: said };
  }
}

export function compareView(): HTMLElement {
  const a = side("A");
  const b = side("B");
  const prompt = el("textarea", {
    rows: 2,
    name: "prompt",
    value: "Once upon a time, there was a little girl named Lily.",
  });
  const verdict = el("p", { role: "status", class: "hint" });
  const start = el("button", { type: "submit", class: "button primary" }, icon("columns"), "Compare");
  const stop = el("button", { type: "button", class: "button", hidden: true }, "Stop");
  let control: AbortController | undefined;
  stop.addEventListener("click", () => control?.abort());

  const run = async () => {
    control = new AbortController();
    start.disabled = true;
    stop.hidden = false;
    verdict.textContent = "One after the other, so that neither slows the other down.";
    a.clear();
    b.clear();
    try {
      const one = await a.run(prompt.value, control.signal);
      const two = await b.run(prompt.value, control.signal);
      const shorter = Math.min(one.ids.length, two.ids.length);
      let same = 0;
      while (same < shorter && one.ids[same] === two.ids[same]) same++;
      if (same === one.ids.length && same === two.ids.length) {
        verdict.textContent = `Both say the same ${same} tokens.`;
      } else {
        verdict.textContent = `The same for ${same} ${same === 1 ? "token" : "tokens"}, then they part.`;
        const from = same === 0 ? 0 : Math.min(one.ends[same - 1], two.ends[same - 1]);
        a.mark(one, from);
        b.mark(two, from);
      }
    } catch (error) {
      verdict.textContent = control.signal.aborted ? "Stopped." : (error as Error).message;
    }
    announce(verdict.textContent ?? "");
    start.disabled = false;
    stop.hidden = true;
  };
  const form = el(
    "form",
    { class: "card" },
    el("label", { class: "field" }, el("span", {}, "Prompt"), prompt),
    el("div", { class: "row" }, start, stop, verdict),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void run();
  });
  return el(
    "section",
    { class: "page", aria: { label: "Compare" } },
    el(
      "header",
      {},
      el("h1", { tabIndex: -1 }, "Compare"),
      el(
        "p",
        {},
        "Two models, two devices or two KV caches answer the same prompt greedily, 64 tokens. Where they part is marked.",
      ),
    ),
    form,
    el("div", { class: "sides" }, a.element, b.element),
  );
}
