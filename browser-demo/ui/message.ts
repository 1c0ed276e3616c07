/** One message of a thread: its text, its buttons, its numbers. */
import type { Message } from "../conversations.ts";
import { copyFrom, el, iconButton } from "./dom.ts";
import { milliseconds, rate } from "./format.ts";
import { renderMarkdown } from "./markdown.ts";

export interface MessageActions {
  regenerate(): void;
  /** Replaces the message's text, drops what followed, and asks again. */
  resend(text: string): void;
}

export interface MessageView {
  readonly element: HTMLElement;
  /** Draws the message as it is now; while streaming at most once a frame. */
  update(streaming?: boolean): void;
}

export function messageView(message: Message, actions: MessageActions): MessageView {
  const mine = message.role === "user";
  const body = el("div", { class: mine ? "body" : "body prose" });
  const foot = el("div", { class: "foot" });
  const element = el(
    "article",
    { class: "message", data: { role: message.role }, aria: { label: mine ? "You" : "Answer" } },
    body,
    foot,
  );
  let frame = 0;

  const draw = (streaming: boolean) => {
    if (mine) body.textContent = message.content;
    else renderMarkdown(message.content, body);
    body.dataset.streaming = String(streaming);
    foot.hidden = streaming;
    if (streaming) return;
    const copy = iconButton("copy", "Copy", () => copyFrom(copy, message.content));
    foot.replaceChildren(copy);
    if (mine) foot.append(iconButton("edit", "Edit and resend", () => edit()));
    else foot.append(iconButton("redo", "Regenerate", actions.regenerate));
    const { stats, error } = message;
    if (stats) {
      const text = `${rate(stats.tokensPerSecond)} tok/s · first token ${milliseconds(stats.firstTokenMs)} · ${stats.completionTokens} tokens · ${stats.by}`;
      foot.append(el("span", { class: "stats numbers" }, text));
    }
    if (error) element.insertBefore(el("div", { class: "notice", role: "alert" }, el("p", {}, error)), foot);
  };

  const edit = () => {
    const text = el("textarea", { value: message.content, rows: 3, aria: { label: "Your message" } });
    const close = () => {
      editor.replaceWith(body);
      foot.hidden = false;
    };
    const send = () => {
      close();
      if (text.value.trim()) actions.resend(text.value.trim());
    };
    text.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) send();
    });
    const editor = el(
      "div",
      { class: "editor" },
      text,
      el(
        "div",
        { class: "row end" },
        el("button", { type: "button", class: "button", on: { click: close } }, "Cancel"),
        el("button", { type: "button", class: "button primary", on: { click: send } }, "Send"),
      ),
    );
    body.replaceWith(editor);
    foot.hidden = true;
    text.focus();
  };

  draw(false);
  return {
    element,
    update(streaming = false) {
      cancelAnimationFrame(frame);
      if (streaming) frame = requestAnimationFrame(() => draw(true));
      else draw(false);
    },
  };
}
