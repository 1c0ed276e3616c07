/** The page: a sidebar, a top bar, and one of four views by the address's hash. */
import "@fontsource-variable/inter/wght.css";
import "./styles/base.css";
import "./styles/layout.css";
import "./styles/chat.css";
import { answeringServed, device, engine, model, refreshStored, server, start } from "./app.ts";
import { newConversation } from "./conversations.ts";
import { registerServiceWorker } from "./service-worker-link.ts";
import { change, settings } from "./settings.ts";
import { chatView, conversations, current, removeConversation, restoreConversation } from "./ui/chat.ts";
import { compareView } from "./ui/compare.ts";
import { el, type IconName, icon, iconButton, type Signal } from "./ui/dom.ts";
import { loadBar, modelsView } from "./ui/models.ts";
import { quantizeView } from "./ui/quantize.ts";
import { settingsDrawer } from "./ui/settings-drawer.ts";

interface View {
  readonly name: string;
  readonly icon: IconName;
  readonly element: HTMLElement;
}

const views: Readonly<Record<string, View>> = {
  chat: { name: "Chat", icon: "chat", element: chatView() },
  models: { name: "Models", icon: "box", element: modelsView() },
  compare: { name: "Compare", icon: "columns", element: compareView() },
  quantize: { name: "Quantize", icon: "squeeze", element: quantizeView() },
};

const logo = new DOMParser().parseFromString(
  '<svg xmlns="http://www.w3.org/2000/svg" viewBox="2 2 28 28" aria-hidden="true"><rect x="3" y="3" width="12" height="12" rx="3"/><rect x="3" y="17" width="12" height="12" rx="3"/><rect x="17" y="17" width="12" height="12" rx="3"/><path d="M17 6a3 3 0 0 1 3-3h1.2A6.8 6.8 0 0 0 29 10.8V12a3 3 0 0 1-3 3h-6a3 3 0 0 1-3-3z"/></svg>',
  "image/svg+xml",
).documentElement;

function sidebar(close: () => void): HTMLElement {
  const history = el("ul");
  const title = el("h2", { id: "history-title" }, "Conversations");
  const redraw = () => {
    title.hidden = conversations.value.length === 0;
    history.replaceChildren(
      ...conversations.value.map((conversation) => {
        const { id, title: text } = conversation;
        const open = () => {
          current.value = conversation;
          location.hash = "chat";
          close();
        };
        const isCurrent = id === current.value.id;
        return el(
          "li",
          { data: { current: String(isCurrent) } },
          el("button", { type: "button", on: { click: open }, aria: isCurrent ? { current: "true" } : {} }, text),
          iconButton("trash", `Delete conversation: ${text}`, () => void removeConversation(id)),
        );
      }),
    );
  };
  conversations.watch(redraw);
  current.watch(redraw);
  const fresh = () => {
    current.value = newConversation();
    location.hash = "chat";
    close();
    document.querySelector<HTMLElement>(".composer textarea")?.focus();
  };
  const links = Object.entries(views).map(([hash, view]) =>
    el("a", { href: `#${hash}`, data: { view: hash }, on: { click: close } }, icon(view.icon), view.name),
  );
  return el(
    "aside",
    { class: "sidebar", id: "sidebar", aria: { label: "Conversations and views" } },
    el("div", { class: "brand" }, document.importNode(logo, true), "Nibble"),
    el("button", { type: "button", class: "button", on: { click: fresh } }, icon("plus"), "New chat"),
    el("nav", { class: "nav", aria: { label: "Views" } }, ...links),
    el("div", { class: "history" }, title, history),
  );
}

function topbar(openMenu: () => void): HTMLElement {
  const drawer = settingsDrawer();
  document.body.append(drawer);
  const name = el("span");
  const where = el("span", { class: "pill" });
  const button = el("a", { class: "model-button", href: "#models" }, name, where);
  const redraw = () => {
    const loaded = model.value;
    const onServer = answeringServed();
    name.textContent = onServer?.id ?? loaded?.info.id ?? "Choose a model";
    where.hidden = !onServer && !loaded && !device.value;
    where.className = loaded || onServer ? "pill on" : "pill";
    const gpu = device.value?.gpu;
    where.textContent = onServer
      ? "Server"
      : loaded
        ? loaded.choice.device === "webgpu"
          ? "WebGPU"
          : `WASM · ${loaded.choice.threads === 1 ? "1 thread" : `${loaded.choice.threads} threads`}`
        : gpu && !gpu.software
          ? "WebGPU ready"
          : "WASM";
    where.title = onServer ? "" : (loaded?.choice.reason ?? "");
  };
  model.watch(redraw);
  device.watch(redraw);
  server.watch(redraw);
  settings.watch(redraw);
  const theme = iconButton("moon", "Dark or light", () => {
    change({ theme: document.documentElement.dataset.theme === "dark" ? "light" : "dark" });
  });
  settings.watch(() => theme.replaceChildren(icon(document.documentElement.dataset.theme === "dark" ? "sun" : "moon")));
  return el(
    "header",
    { class: "topbar" },
    iconButton("menu", "Menu", openMenu, "ghost only-narrow"),
    button,
    el("span", { class: "spring" }),
    theme,
    iconButton("sliders", "Settings", () => drawer.showModal()),
  );
}

/** One line for those who wonder why it is slow: what this browser or host lacks. */
function lacks(): HTMLElement {
  const text = el("p");
  const element = el("div", { class: "notice calm", role: "note" }, text);
  element.append(iconButton("close", "Dismiss", () => change({ dismissed: text.textContent ?? "" })));
  const redraw = () => {
    const found = device.value;
    const parts: string[] = [];
    if (found && !found.gpu) parts.push(`No WebGPU here (${found.noGpuReason}): models run on WASM.`);
    else if (found?.gpu?.software) parts.push("WebGPU is emulated in software here: models run on WASM.");
    if (found && !found.crossOriginIsolated)
      parts.push("The host sends no COOP and COEP headers: WASM runs on one thread.");
    text.textContent = parts.join(" ");
    element.hidden = parts.length === 0 || settings.value.dismissed === text.textContent || !!answeringServed();
  };
  for (const signal of [device, settings, server]) (signal as Signal<unknown>).watch(redraw);
  return el("div", { class: "dock lacks" }, element);
}

function page(): HTMLElement {
  const app = el("div", { class: "app" });
  const close = () => (app.dataset.menu = "closed");
  const open = () => {
    app.dataset.menu = "open";
    app.querySelector<HTMLElement>(".sidebar .button")?.focus();
  };
  const view = el("main", { class: "view" });
  const notices = el("section", { class: "notices", aria: { label: "Status" } }, lacks(), loadBar());
  const bars = el("div", {}, topbar(open), notices);
  app.append(sidebar(close), el("div", { class: "main" }, bars, view));
  app.addEventListener("keydown", (event) => event.key === "Escape" && close());
  view.addEventListener("pointerdown", close);
  const route = () => {
    const hash = location.hash.slice(1) in views ? location.hash.slice(1) : "chat";
    view.replaceChildren(views[hash].element);
    if (hash === "models") void refreshStored(); // answers leave what was computed of their prompts
    document.title = hash === "chat" ? "Nibble: a language model in this tab" : `${views[hash].name} · Nibble`;
    for (const link of app.querySelectorAll<HTMLElement>(".nav a")) {
      if (link.dataset.view === hash) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    views[hash].element.querySelector<HTMLElement>("h1[tabindex]")?.focus({ preventScroll: true });
  };
  window.addEventListener("hashchange", route);
  route();
  return app;
}

document.body.append(page());
registerServiceWorker(() => {
  if (!model.value) return undefined;
  const { port1, port2 } = new MessageChannel();
  void engine.rpc.call("connect", port1, { transfer: [port1] });
  return port2;
});
void restoreConversation();
void start();
