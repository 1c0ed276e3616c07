/**
 * Two models, devices or KV caches on one prompt, and stock transformers.js beside them: what each says, how fast, and
 * where they part.
 */
import { KV_POLICIES } from "../../src/kv/policies.ts";
import { EngineWorker } from "../../src/web/client.ts";
import type { DeviceWish } from "../../src/web/device.ts";
import type { LoadedModel } from "../../src/web/protocol.ts";
import { samplingOf } from "../answer.ts";
import { engine, ortUrl, startWorker, stored } from "../app.ts";
import { settings } from "../settings.ts";
import { type AnswerBox, agreement, answerBox, type Result, speed, verdictOf } from "./answer-box.ts";
import { peerSide } from "./compare-peer.ts";
import { announce, el, icon } from "./dom.ts";
import { bytes, milliseconds } from "./format.ts";

interface Side {
  readonly element: HTMLElement;
  readonly box: AnswerBox;
  /** The stored model that was chosen, "" where there is none. */
  readonly id: string;
  /** The graph that answered last. */
  readonly file: string;
  run(prompt: string, signal: AbortSignal): Promise<Result>;
}

/** Of each answer: enough to see where two part. */
const TOKENS = 64;

const devices: Readonly<Record<string, { text: string; device: DeviceWish; asStored?: boolean }>> = {
  auto: { text: "Best device", device: "auto" },
  wasm: { text: "WASM", device: "wasm" },
  stored: { text: "WASM, weights as stored", device: "wasm", asStored: true },
  webgpu: { text: "WebGPU", device: "webgpu" },
};

/** Which tokens a cache keeps, by the names of `--kv-policy`. */
const policies = new Map(
  KV_POLICIES.map((name) => [name, name === "full" ? "Keeps all tokens" : `Keeps some: ${name}`] as const),
);
/** Of a short answer and its prompt, enough to drop something. */
const BUDGET = 64;

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
  const policy = select(`Cache policy ${letter}`, policies);
  const budget = el("input", {
    type: "number",
    min: "64",
    step: "16",
    value: String(BUDGET),
    title: "Tokens that the cache keeps",
    aria: { label: `Tokens kept ${letter}` },
  });
  const forgets = () => policy.value !== "full";
  const showBudget = () => (budget.hidden = !forgets());
  policy.addEventListener("change", showBudget);
  showBudget();
  const box = answerBox(`Answer ${letter}`);
  let file = "";

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

  return {
    element: el(
      "div",
      { class: "side" },
      el("h2", {}, letter),
      model,
      el("div", { class: "grid-2" }, device, graph),
      el("div", { class: "grid-2" }, policy, budget),
      box.text,
      box.facts,
    ),
    box,
    get id() {
      return model.value;
    },
    get file() {
      return file;
    },
    async run(prompt, signal) {
      // A worker of its own, ended afterwards: the two sides share no memory, build or cache.
      const worker = new EngineWorker(startWorker);
      try {
        box.show([["State", "loading"]]);
        const source = { kind: "stored", id: model.value } as const;
        const { device: wish, asStored } = devices[device.value];
        // each computes the whole prompt: what an earlier run left would be the other's time
        const fresh = { prefixCacheBytes: 0 };
        const kept = forgets() ? { kvPolicy: policy.value, kvBudget: Number(budget.value) } : {};
        const graphs = { asStored, graph: graph.value || undefined };
        const request = { source, device: wish, ortUrl, ...graphs, ...kept, ...fresh };
        const loaded = await worker.load(request, { signal });
        return await say(worker, loaded, prompt, signal);
      } catch (error) {
        box.show([["Failed", (error as Error).message]]);
        throw error;
      } finally {
        worker.terminate();
      }
    },
  };

  async function say(worker: EngineWorker, loaded: LoadedModel, prompt: string, signal: AbortSignal): Promise<Result> {
    file = loaded.info.file;
    const ids: number[] = [];
    const ends: number[] = [];
    let said = "";
    const started = performance.now();
    let first = 0;
    const options = { ...samplingOf(settings.value), temperature: 0, repetitionPenalty: 1, maxTokens: TOKENS, signal };
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
      box.text.textContent = said;
    }
    const decodeMs = performance.now() - first;
    box.show([
      ["Speed", speed(ids.length, decodeMs)],
      ["First token", milliseconds(first - started)],
      ["Load", milliseconds(loaded.loadMs)],
      ["Weights", bytes(loaded.info.memory.weightBytes)],
      [
        "KV cache",
        `${loaded.info.kv.format} ${loaded.info.kv.policy}, ${bytes(loaded.info.memory.kvBytesPerToken)} a token`,
      ],
      ...loaded.notes.map((note) => ["Note", note] as const),
      ["Runs on", loaded.choice.reason],
    ]);
    return { ids, ends, text: said };
  }
}

export function compareView(): HTMLElement {
  const a = side("A");
  const b = side("B");
  const third = peerSide();
  const withPeer = el("input", { type: "checkbox", name: "peer" });
  const prompt = el("textarea", {
    rows: 2,
    name: "prompt",
    value: "Once upon a time, there was a little girl named Lily.",
  });
  const verdict = el("p", { role: "status", class: "hint" });
  const start = el("button", { type: "submit", class: "button primary" }, icon("columns"), "Compare");
  const stop = el("button", { type: "button", class: "button", hidden: true }, "Stop");
  let control: AbortController | undefined;
  let running = false;
  stop.addEventListener("click", () => control?.abort());
  /** Nothing can be compared before the page knows what is stored. */
  const offer = () => {
    start.disabled = running || a.id === "" || b.id === "";
    stop.hidden = !running;
  };
  stored.watch(offer); // after both sides, which list the models first

  /** Marks where an answer leaves A's, in A too where nothing has parted from it before. */
  const marked = (one: Result, other: Result, box: AnswerBox, name: string): string => {
    const found = agreement(one, other);
    if (found.from !== undefined) {
      box.mark(other, found.from);
      if (!a.box.text.querySelector("mark")) a.box.mark(one, found.from);
    }
    return verdictOf(found, "A", name);
  };

  const run = async () => {
    control = new AbortController();
    running = true;
    offer();
    verdict.textContent = "One after the other, so that none slows another down.";
    for (const { box } of [a, b, third]) box.clear();
    try {
      const one = await a.run(prompt.value, control.signal);
      const two = await b.run(prompt.value, control.signal);
      const verdicts = [marked(one, two, b.box, "B")];
      if (withPeer.checked) {
        const theirs = await third.run(a.id, a.file, prompt.value, TOKENS, control.signal);
        verdicts.push(marked(one, theirs, third.box, "transformers.js"));
      }
      verdict.textContent = verdicts.join(" ");
    } catch (error) {
      verdict.textContent = control.signal.aborted ? "Stopped." : (error as Error).message;
    }
    announce(verdict.textContent ?? "");
    running = false;
    offer();
  };
  const form = el(
    "form",
    { class: "card" },
    el("label", { class: "field" }, el("span", {}, "Prompt"), prompt),
    el("label", { class: "check" }, withPeer, "transformers.js on A's files as a third (fetches its runtime, 27 MB)"),
    el("div", { class: "row" }, start, stop, verdict),
  );
  const sides = el("div", { class: "sides" }, a.element, b.element, third.element);
  const showThird = () => {
    third.element.hidden = !withPeer.checked;
    sides.dataset.count = withPeer.checked ? "3" : "2";
  };
  withPeer.addEventListener("change", showThird);
  showThird();
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
        `Two models, two devices, two KV caches or policies answer the same prompt greedily, ${TOKENS} tokens. Where they part is marked.`,
      ),
    ),
    form,
    sides,
  );
}
