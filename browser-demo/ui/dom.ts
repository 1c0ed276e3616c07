/** The little there is of a framework: elements from a call, values that tell who watches them. */

type Child = Node | string | undefined | false;
type Props<T> = { [K in keyof T]?: T[K] } & {
  class?: string;
  data?: Record<string, string>;
  aria?: Record<string, string>;
  on?: { [E in keyof HTMLElementEventMap]?: (event: HTMLElementEventMap[E]) => void };
};

/** An element with properties, data and aria attributes, listeners and children. */
export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  props: Props<Omit<HTMLElementTagNameMap[K], "children">> = {},
  ...children: Child[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  const { class: className, data, aria, on, ...rest } = props;
  if (className) element.className = className;
  for (const [name, value] of Object.entries(data ?? {})) element.dataset[name] = value;
  for (const [name, value] of Object.entries(aria ?? {})) element.setAttribute(`aria-${name}`, value);
  for (const [name, listener] of Object.entries(on ?? {})) element.addEventListener(name, listener as EventListener);
  for (const [name, value] of Object.entries(rest)) {
    if (name === "role" || name === "for" || name === "list") element.setAttribute(name, String(value));
    else (element as unknown as Record<string, unknown>)[name] = value;
  }
  element.append(...children.filter((child): child is Node | string => child !== undefined && child !== false));
  return element;
}

/** A value and its watchers; each is called at once with the value as it is. */
export class Signal<T> {
  private readonly watchers = new Set<(value: T) => void>();

  constructor(private current: T) {}

  get value(): T {
    return this.current;
  }

  set value(next: T) {
    this.current = next;
    for (const watcher of this.watchers) watcher(next);
  }

  watch(watcher: (value: T) => void): () => void {
    this.watchers.add(watcher);
    watcher(this.current);
    return () => this.watchers.delete(watcher);
  }
}

const paths = {
  plus: "M12 5v14M5 12h14",
  send: "M12 19V6M6 11.5 12 5.5l6 6",
  stop: "M8 8h8v8H8z",
  copy: "M9 9h10v10H9zM5 15V5h10",
  check: "M5 12.5l4.5 4.5L19 7.5",
  redo: "M19 8a8 8 0 1 0 1 5M19.5 3.5V8H15",
  edit: "M5 19l1-4L16.5 4.5l3 3L9 18zM14.5 6.5l3 3",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l1 12.5h8L17 7",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8zM12 2.5v2M12 19.5v2M2.5 12h2M19.5 12h2M5.3 5.3l1.4 1.4M17.3 17.3l1.4 1.4M5.3 18.7l1.4-1.4M17.3 6.7l1.4-1.4",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  sliders: "M4 7h9M17 7h3M15 5v4M4 17h3M11 17h9M9 15v4",
  menu: "M4 7h16M4 12h16M4 17h16",
  close: "M6 6l12 12M18 6L6 18",
  folder: "M3.5 18.5v-13h6l2 2.5h9v10.5z",
  box: "M12 3l8 4.5v9L12 21l-8-4.5v-9zM4 7.5l8 4.5 8-4.5M12 12v9",
  columns: "M4 5h6.5v14H4zM13.5 5H20v14h-6.5z",
  squeeze: "M4 12h5M20 12h-5M6.5 9l3 3-3 3M17.5 9l-3 3 3 3M12 4v16",
  chat: "M4 5h16v11H10l-4.5 3.5V16H4z",
  down: "M12 4v12M6.5 10.5 12 16l5.5-5.5M5 20h14",
} as const;
export type IconName = keyof typeof paths;

const SVG = "http://www.w3.org/2000/svg";

/** A line icon, hidden from screen readers: its button carries the name. */
export function icon(name: IconName): SVGSVGElement {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", paths[name]);
  svg.append(path);
  return svg;
}

/** A button that shows only an icon. */
export function iconButton(name: IconName, label: string, onClick: () => void, className = "ghost"): HTMLButtonElement {
  const props = { type: "button", class: `icon-button ${className}`, title: label, aria: { label } } as const;
  return el("button", { ...props, on: { click: onClick } }, icon(name));
}

/** Puts text on the clipboard and shows a tick on the button for a moment. */
export async function copyFrom(button: HTMLElement, text: string): Promise<void> {
  await navigator.clipboard.writeText(text);
  const old = [...button.childNodes];
  button.replaceChildren(icon("check"));
  announce("Copied");
  setTimeout(() => button.replaceChildren(...old), 1200);
}

const live = el("div", { class: "visually-hidden", role: "status", aria: { live: "polite" } });

/** Says something to a screen reader. */
export function announce(text: string): void {
  if (!live.isConnected) document.body.append(live);
  live.textContent = text;
}
