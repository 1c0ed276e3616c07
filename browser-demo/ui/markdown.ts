/** A model's markdown as safe elements. Nothing in it may fetch: images, styles and forms are dropped. */
import DOMPurify from "dompurify";
import { marked } from "marked";
import { copyFrom, el } from "./dom.ts";

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName !== "A") return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer");
});

const allowed = {
  USE_PROFILES: { html: true },
  FORBID_TAGS: ["img", "picture", "video", "audio", "source", "style", "form", "input", "button", "textarea", "select"],
  FORBID_ATTR: ["style", "class", "id", "srcset", "background"],
  RETURN_DOM_FRAGMENT: true,
} as const;

/** Replaces what `into` shows. */
export function renderMarkdown(text: string, into: HTMLElement): void {
  const html = marked.parse(text, { async: false, gfm: true, breaks: true });
  const fragment = DOMPurify.sanitize(html, {
    ...allowed,
    FORBID_TAGS: [...allowed.FORBID_TAGS],
    FORBID_ATTR: [...allowed.FORBID_ATTR],
  });
  for (const table of fragment.querySelectorAll("table")) {
    const frame = el("div", { class: "table-frame", tabIndex: 0, role: "region", aria: { label: "Table" } });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const block of fragment.querySelectorAll("pre")) {
    block.tabIndex = 0; // scrolls sideways: the keyboard must reach it
    const copy = el("button", { type: "button", class: "copy-code" }, "Copy");
    copy.addEventListener("click", () => copyFrom(copy, block.querySelector("code")?.textContent ?? ""));
    const frame = el("div", { class: "code-frame" });
    block.replaceWith(frame);
    frame.append(block, copy);
  }
  into.replaceChildren(fragment);
}
