/** Models: what is here, where more come from, and one bar while one arrives. */
import type { NibbleError } from "../../src/errors.ts";
import { droppedFolder } from "../../src/web/dropped.ts";
import { filesSource, parseSource } from "../../src/web/remote.ts";
import type { StoredModel } from "../../src/web/store.ts";
import {
  answeringServed,
  device,
  forgetPrompts,
  type Loading,
  load,
  loading,
  loadSource,
  model,
  problem,
  removeStored,
  server,
  shippedModel,
  stored,
} from "../app.ts";
import type { ServedModel } from "../server-backend.ts";
import { change, settings } from "../settings.ts";
import { el, icon, iconButton } from "./dom.ts";
import { bytes, count, duration } from "./format.ts";

/** What the welcome offers while no model is open. */
export function modelOffers(): HTMLElement {
  if (loading.value) return el("div", { class: "hint" }, `Opening ${loading.value.name} …`);
  const complete = stored.value.filter((one) => one.complete);
  const buttons = complete.map(({ id }) =>
    el(
      "button",
      { type: "button", class: "button primary", on: { click: () => void load({ kind: "stored", id }, id) } },
      `Open ${id}`,
    ),
  );
  buttons.push(...servedButtons());
  if (buttons.length === 0) buttons.push(shippedButton());
  return el("div", { class: "row" }, ...buttons, el("a", { class: "button", href: "#models" }, "Other models"));
}

/** The server's own models, fetched from it and run in this page. */
function servedButtons(): HTMLButtonElement[] {
  const served = server.value?.models ?? [];
  return served
    .filter(({ id }) => !stored.value.some((one) => one.complete && one.id === id))
    .map(({ id }) =>
      el(
        "button",
        { type: "button", class: "button primary", on: { click: () => runHere(id) } },
        icon("down"),
        `Open ${id}`,
      ),
    );
}

/** Fetches one of the server's models and runs it in this page. */
function runHere(id: string): void {
  const url = new URL(`models/${encodeURIComponent(id)}/`, document.baseURI).href;
  void loadSource({ kind: "url", url });
}

function servedItem({ id, contextLength }: ServedModel): HTMLElement {
  const chosen = answeringServed()?.id === id;
  const ask = () => {
    change({ runOn: "server", servedModel: id });
    location.hash = "chat";
  };
  const context = contextLength ? `, ${count(contextLength)} tokens of context` : "";
  return el(
    "li",
    {},
    el("div", { class: "about" }, el("strong", {}, id), el("small", {}, `on this server${context}`)),
    chosen && el("span", { class: "pill on" }, "Answers"),
    !chosen && el("button", { type: "button", class: "button", on: { click: ask } }, "Ask the server"),
    el("button", { type: "button", class: "button", on: { click: () => runHere(id) } }, "Run in this page"),
  );
}

function shippedButton(): HTMLButtonElement {
  const open = () => void loadSource({ kind: "url", url: shippedModel.url });
  return el(
    "button",
    { type: "button", class: "button primary", on: { click: open } },
    icon("down"),
    `Open ${shippedModel.name}`,
  );
}

function stage({ event, name }: Loading): { title: string; detail: string; share: number | undefined } {
  if (event?.stage === "download") {
    const { receivedBytes, totalBytes, bytesPerSecond, secondsLeft } = event.progress;
    const speed = bytesPerSecond > 0 ? ` · ${bytes(bytesPerSecond)}/s` : "";
    const left = secondsLeft === undefined ? "" : ` · ${duration(secondsLeft)} left`;
    const detail = `${bytes(receivedBytes)} of ${bytes(totalBytes)}${speed}${left}`;
    return { title: `Downloading ${name}`, detail, share: receivedBytes / totalBytes };
  }
  if (event?.stage === "prepare") {
    const detail = `Expanding 4-bit weights for WASM, once: ${event.done} of ${event.total} matrices`;
    return { title: `Preparing ${name}`, detail, share: event.done / event.total };
  }
  if (event?.stage === "runtime")
    return { title: `Opening ${name}`, detail: "Starting ONNX Runtime", share: undefined };
  if (event?.stage === "session") return { title: `Opening ${name}`, detail: "Building the session", share: undefined };
  return { title: `Looking at ${name}`, detail: "", share: undefined };
}

/** The bar while a model arrives, and what stopped one: shown above every view. */
export function loadBar(): HTMLElement {
  const title = el("strong");
  const detail = el("span", { class: "hint numbers" });
  const bar = el("progress", { max: 1, aria: { label: "Loading the model" } });
  const cancel = el(
    "button",
    { type: "button", class: "button", on: { click: () => loading.value?.cancel() } },
    "Stop",
  );
  const progress = el("div", { class: "card download" }, el("div", { class: "row" }, title, cancel), bar, detail);
  const notice = el("div");
  const element = el("div", { class: "dock load-bar" }, progress, notice);
  loading.watch((now) => {
    progress.hidden = now === undefined;
    if (!now) return;
    const { title: what, detail: how, share } = stage(now);
    title.textContent = what;
    detail.textContent = how;
    if (share === undefined) bar.removeAttribute("value");
    else bar.value = share;
  });
  problem.watch((now) => {
    if (!now) return notice.replaceChildren();
    const { message, remedy } = now;
    const close = iconButton("close", "Dismiss", () => (problem.value = undefined));
    const fix =
      remedy && el("button", { type: "button", class: "button", on: { click: () => remedy.run() } }, remedy.label);
    notice.replaceChildren(el("div", { class: "notice", role: "alert" }, el("p", {}, message), fix, close));
  });
  return element;
}

function storedItem(one: StoredModel): HTMLElement {
  const { id, origin, storedBytes, madeBytes, promptBytes, sizeBytes, complete, verified } = one;
  const open = model.value?.stored.id === id;
  const made = madeBytes > 0 ? ` and ${bytes(madeBytes)} made from it` : "";
  const prompts = promptBytes > 0 ? `, ${bytes(promptBytes)} of prompts` : "";
  const size = complete ? bytes(storedBytes) + made + prompts : `${bytes(storedBytes)} of ${bytes(sizeBytes)}`;
  const start = () => {
    if (complete) void load({ kind: "stored", id }, id);
    else void loadSource(id.includes("/") ? parseSource(id) : { kind: "url", url: origin }); // hub ids have a slash
  };
  return el(
    "li",
    {},
    el("div", { class: "about" }, el("strong", {}, id), el("small", {}, `${size} · ${origin}`)),
    open && el("span", { class: "pill on" }, "Open"),
    verified && el("span", { class: "pill", title: "Every file has the SHA-256 that its folder lists" }, "Verified"),
    !open && el("button", { type: "button", class: "button", on: { click: start } }, complete ? "Open" : "Resume"),
    promptBytes > 0 &&
      el(
        "button",
        {
          type: "button",
          class: "button",
          title: "Deletes what was computed of prompts; the next answer computes it again",
          on: { click: () => void forgetPrompts([id]) },
        },
        "Forget prompts",
      ),
    iconButton("trash", `Delete ${id}`, () => void removeStored(id)),
  );
}

export function modelsView(): HTMLElement {
  const served = el("ul", { class: "models", aria: { label: "Models of this server" } });
  const list = el("ul", { class: "models", aria: { label: "Models in this browser" } });
  const room = el("p", { class: "hint numbers" });
  const redraw = () => {
    served.replaceChildren(...(server.value?.models ?? []).map(servedItem));
    served.hidden = served.childElementCount === 0;
    const items = stored.value.map(storedItem);
    list.replaceChildren(...items);
    list.hidden = items.length === 0;
    const storage = device.value?.storage;
    const used = stored.value.reduce(
      (sum, { storedBytes, madeBytes, promptBytes }) => sum + storedBytes + madeBytes + promptBytes,
      0,
    );
    const quota = storage ? ` The browser allows this site ${bytes(storage.quotaBytes)}.` : "";
    room.textContent = items.length ? `${bytes(used)} on this device.${quota}` : `Nothing stored yet.${quota}`;
  };
  stored.watch(redraw);
  model.watch(redraw);
  device.watch(redraw);
  server.watch(redraw);
  settings.watch(redraw);

  const address = el("input", {
    name: "address",
    required: true,
    placeholder: "org/name or https://host/model/",
    autocomplete: "off",
    spellcheck: false,
  });
  const complaint = el("p", { class: "hint", role: "alert" });
  const byAddress = el(
    "form",
    { class: "card" },
    el("h2", {}, "From an address"),
    el(
      "label",
      { class: "field" },
      el("span", {}, "Hub id or URL"),
      address,
      el("small", {}, "A folder made by nibble, or a transformers.js folder with a q4 graph."),
    ),
    complaint,
    el(
      "div",
      { class: "row" },
      el("button", { class: "button primary", type: "submit" }, icon("down"), "Download and open"),
    ),
  );
  byAddress.addEventListener("submit", (event) => {
    event.preventDefault();
    complaint.textContent = "";
    try {
      void loadSource(parseSource(address.value));
    } catch (error) {
      complaint.textContent = (error as NibbleError).message;
    }
  });

  return el(
    "section",
    { class: "page", aria: { label: "Models" } },
    el(
      "header",
      {},
      el("h1", { tabIndex: -1 }, "Models"),
      el(
        "p",
        {},
        "Downloaded once, checked by hash, kept in this browser. A stopped download goes on where it stopped.",
      ),
    ),
    served,
    list,
    room,
    el(
      "div",
      { class: "grid-2" },
      el(
        "div",
        { class: "card" },
        el("h2", {}, "Ships with the page"),
        el(
          "p",
          { class: "hint" },
          "stories260K: a llama of 260 thousand parameters that tells short stories for children. Under a megabyte.",
        ),
        el("div", { class: "row" }, shippedButton()),
      ),
      byAddress,
    ),
    folderDrop(
      "Drop a model folder here",
      "Or choose one. It is copied into this browser's storage, nothing is uploaded.",
      (files) => {
        void loadSource(files);
      },
    ),
  );
}

/** A place to drop a folder, and the button for those who do not drag. */
export function folderDrop(
  title: string,
  hint: string,
  onFolder: (source: { kind: "files"; name: string; files: ReadonlyMap<string, File> }) => void,
): HTMLElement {
  const picker = el("input", {
    type: "file",
    class: "visually-hidden",
    multiple: true,
    tabIndex: -1,
    aria: { label: title },
  });
  picker.webkitdirectory = true;
  picker.addEventListener("change", () => {
    const source = filesSource(picker.files ?? []);
    picker.value = "";
    if (source.kind === "files" && source.files.size > 0) onFolder(source as Parameters<typeof onFolder>[0]);
  });
  const choose = el(
    "button",
    { type: "button", class: "button", on: { click: () => picker.click() } },
    icon("folder"),
    "Choose a folder",
  );
  const area = el(
    "div",
    { class: "drop" },
    el("strong", {}, title),
    el("span", { class: "hint" }, hint),
    choose,
    picker,
  );
  area.addEventListener("dragover", (event) => {
    event.preventDefault();
    area.dataset.over = "true";
  });
  area.addEventListener("dragleave", () => (area.dataset.over = "false"));
  area.addEventListener("drop", async (event) => {
    event.preventDefault();
    area.dataset.over = "false";
    const items = event.dataTransfer?.items;
    if (items) onFolder({ kind: "files", ...(await droppedFolder(items)) });
  });
  return area;
}
