/** Settings: who answers, how tokens are drawn, where it runs. Changes hold at once. */
import { answeringServed, model, server } from "../app.ts";
import { change, defaults, type Settings, settings } from "../settings.ts";
import { el, iconButton } from "./dom.ts";

type NumberKey = { [K in keyof Settings]: Settings[K] extends number ? K : never }[keyof Settings];

function slider(key: NumberKey, label: string, hint: string, min: number, max: number, step: number): HTMLElement {
  // its own name: the label around both belongs to the output, the first of them
  const limits = { min: String(min), max: String(max), step: String(step) };
  const range = el("input", { type: "range", ...limits, name: key, aria: { label } });
  const output = el("output", { class: "numbers" });
  range.addEventListener("input", () => change({ [key]: Number(range.value) }));
  settings.watch((now) => {
    range.value = String(now[key]);
    output.value = String(now[key]);
  });
  return el("label", { class: "slider" }, el("span", {}, label), output, range, el("small", {}, hint));
}

function choices<K extends "theme" | "device" | "runOn">(
  key: K,
  legend: string,
  options: Readonly<Partial<Record<Settings[K], string>>>,
  /** Which one holds, where that is not what is set. */
  chosen: (now: Settings) => string = (now) => now[key],
): HTMLFieldSetElement {
  const labels = Object.entries(options as Readonly<Record<string, string>>).map(([value, text]) => {
    const radio = el("input", { type: "radio", name: key, value });
    radio.addEventListener("change", () => change({ [key]: value }));
    settings.watch((now) => (radio.checked = chosen(now) === value));
    server.watch(() => (radio.checked = chosen(settings.value) === value));
    return el("label", {}, radio, el("span", {}, text));
  });
  return el("fieldset", {}, el("legend", {}, legend), el("div", { class: "choices" }, ...labels));
}

export function settingsDrawer(): HTMLDialogElement {
  const system = el("textarea", { rows: 4, name: "system", placeholder: "You are a helpful assistant." });
  system.addEventListener("input", () => change({ system: system.value }));
  const seed = el("input", { type: "number", name: "seed", min: "0", step: "1", placeholder: "new every time" });
  seed.addEventListener("input", () => change({ seed: seed.value }));
  const context = el("input", {
    type: "number",
    name: "context",
    min: "0",
    step: "64",
    placeholder: "the model's own",
  });
  context.addEventListener("change", () => change({ context: Number(context.value) || 0 }));
  settings.watch((now) => {
    if (document.activeElement !== system) system.value = now.system;
    if (document.activeElement !== seed) seed.value = now.seed;
    if (document.activeElement !== context) context.value = now.context ? String(now.context) : "";
  });
  const noTemplate = el("small", {}, "The open model is a base model: it has no chat template, so this is not used.");
  model.watch((loaded) => (noTemplate.hidden = loaded?.hasChatTemplate !== false));
  const where = { page: "In this page", server: "On the server" };
  const runOn = choices("runOn", "Answers are made", where, () => (answeringServed() ? "server" : "page"));
  server.watch((found) => (runOn.hidden = found === undefined));

  const reset = () => {
    const { temperature, topK, topP, minP, repetitionPenalty, maxTokens, seed: none } = defaults;
    change({ temperature, topK, topP, minP, repetitionPenalty, maxTokens, seed: none });
  };
  const dialog = el("dialog", { class: "drawer", aria: { label: "Settings" } });
  dialog.append(
    el(
      "form",
      { method: "dialog" },
      el(
        "header",
        {},
        el("h2", {}, "Settings"),
        iconButton("close", "Close settings", () => dialog.close()),
      ),
      runOn,
      el("label", { class: "field" }, el("span", {}, "System prompt"), system, noTemplate),
      el(
        "fieldset",
        {},
        el("legend", {}, "Sampling"),
        slider("temperature", "Temperature", "0 always takes the likeliest token.", 0, 2, 0.05),
        slider("topK", "Top k", "Draw from the k likeliest; 0 is all.", 0, 200, 1),
        slider("topP", "Top p", "Draw from the likeliest that make up this share.", 0.05, 1, 0.05),
        slider("minP", "Min p", "Drop tokens below this share of the likeliest.", 0, 0.5, 0.01),
        slider("repetitionPenalty", "Repetition penalty", "Above 1, words already used become unlikelier.", 1, 2, 0.05),
        slider("maxTokens", "Longest answer", "In tokens; at most a quarter of the model's context.", 16, 4096, 16),
        el("label", { class: "field" }, el("span", {}, "Seed"), seed),
        el(
          "div",
          { class: "row" },
          el("button", { type: "button", class: "button", on: { click: reset } }, "Back to defaults"),
        ),
      ),
      choices("device", "Runs on", { auto: "Best", webgpu: "WebGPU", wasm: "WASM" }),
      el(
        "label",
        { class: "field" },
        el("span", {}, "Context length"),
        context,
        el(
          "small",
          {},
          "Tokens of prompt and answer together. This and the device hold from the next opening of a model.",
        ),
      ),
      choices("theme", "Theme", { system: "System", light: "Light", dark: "Dark" }),
    ),
  );
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // the backdrop
  });
  return dialog;
}
