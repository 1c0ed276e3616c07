/** Quantize in the page: a dropped checkpoint becomes a 4-bit model here, with the same code that Node runs. */
import { EngineWorker } from "../../src/web/client.ts";
import { load, ortUrl, refreshStored, startWorker } from "../app.ts";
import type { PageMethods, QuantizeEvent, QuantizeRequest } from "../protocol.ts";
import { announce, el, icon } from "./dom.ts";
import { bytes } from "./format.ts";
import { folderDrop } from "./models.ts";

const methods: Readonly<Record<QuantizeRequest["method"], string>> = {
  gptq: "GPTQ (calibrated)",
  awq: "AWQ (calibrated)",
  rtn: "Round to nearest",
};

export function quantizeView(): HTMLElement {
  let folder: { name: string; files: ReadonlyMap<string, File> } | undefined;
  let control: AbortController | undefined;
  const method = el(
    "select",
    { name: "method" },
    ...Object.entries(methods).map(([value, text]) => el("option", { value }, text)),
  );
  const group = el(
    "select",
    { name: "group" },
    ...[32, 64, 128].map((size) => el("option", { value: String(size) }, String(size))),
  );
  const calibration = el("input", { type: "file", accept: ".txt,text/plain", name: "calibration" });
  const chosen = el("p", { class: "hint" }, "No folder chosen yet.");
  const start = el("button", { type: "submit", class: "button primary", disabled: true }, icon("squeeze"), "Quantize");
  const stop = el("button", { type: "button", class: "button", hidden: true }, "Stop");
  const title = el("strong");
  const bar = el("progress", { max: 1, value: 0, aria: { label: "Quantizing" } });
  const progress = el("div", { class: "card download", hidden: true }, title, bar);
  const rows = el("tbody");
  const table = el(
    "table",
    { class: "layers", hidden: true },
    el(
      "thead",
      {},
      el("tr", {}, el("th", { scope: "col" }, "Layer"), el("th", { scope: "col", class: "numbers" }, "Relative error")),
    ),
    rows,
  );
  const outcome = el("div");

  const drop = folderDrop(
    "Drop a checkpoint folder here",
    "config.json, tokenizer.json and .safetensors files. Nothing is uploaded.",
    (source) => {
      folder = source;
      const size = [...source.files.values()].reduce((sum, file) => sum + file.size, 0);
      chosen.textContent = `${source.name}: ${source.files.size} files, ${bytes(size)}`;
      start.disabled = false;
    },
  );

  const onEvent = (event: QuantizeEvent) => {
    if (event.total > 0) {
      title.textContent = event.stage;
      bar.value = event.done / event.total;
    }
    if (event.layer) {
      table.hidden = false;
      const { name, error } = event.layer;
      rows.prepend(
        el(
          "tr",
          {},
          el("td", {}, name),
          el("td", { class: "numbers" }, error === undefined ? "" : error.toExponential(2)),
        ),
      );
    }
  };

  const run = async () => {
    if (!folder) return;
    control = new AbortController();
    start.disabled = true;
    stop.hidden = false;
    progress.hidden = false;
    rows.replaceChildren();
    outcome.replaceChildren();
    // A worker of its own: the chat's model stays open, and all memory goes back at the end.
    const worker = new EngineWorker<PageMethods>(startWorker);
    try {
      const request: QuantizeRequest = {
        name: folder.name,
        files: folder.files,
        method: method.value as QuantizeRequest["method"],
        bits: 4,
        groupSize: Number(group.value),
        text: calibration.files?.[0],
        textUrl: new URL("calibration/", document.baseURI).href,
        ortUrl,
      };
      const { id, storedBytes } = await worker.rpc.call("quantize", request, { onEvent, signal: control.signal });
      const open = () => {
        void load({ kind: "stored", id }, id);
        location.hash = "chat";
      };
      outcome.replaceChildren(
        el(
          "div",
          { class: "notice calm", role: "status" },
          el("p", {}, `${id}: ${bytes(storedBytes)}, kept in this browser.`),
          el("button", { type: "button", class: "button primary", on: { click: open } }, "Open and chat"),
        ),
      );
      announce(`${id} is ready`);
    } catch (error) {
      if (!control.signal.aborted)
        outcome.replaceChildren(el("div", { class: "notice", role: "alert" }, el("p", {}, (error as Error).message)));
    }
    worker.terminate();
    progress.hidden = true;
    stop.hidden = true;
    start.disabled = false;
    await refreshStored();
  };
  stop.addEventListener("click", () => control?.abort());
  const form = el(
    "form",
    { class: "card" },
    el(
      "div",
      { class: "grid-2" },
      el("label", { class: "field" }, el("span", {}, "Method"), method),
      el("label", { class: "field" }, el("span", {}, "Group size"), group),
      el("label", { class: "field" }, el("span", {}, "Calibration text (optional)"), calibration),
    ),
    chosen,
    el("div", { class: "row" }, start, stop),
  );
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    void run();
  });
  return el(
    "section",
    { class: "page", aria: { label: "Quantize" } },
    el(
      "header",
      {},
      el("h1", { tabIndex: -1 }, "Quantize in this page"),
      el(
        "p",
        {},
        "A checkpoint becomes a 4-bit model in this tab, block by block. The result is kept in this browser and opens here.",
      ),
    ),
    drop,
    form,
    progress,
    outcome,
    table,
  );
}
