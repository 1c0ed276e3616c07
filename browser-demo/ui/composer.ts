/** Where a message is written. One that is sent before there is a model to ask waits for it. */
import { answeredBy } from "../answer.ts";
import { isComing, loading } from "../app.ts";
import { announce, el, icon, Signal } from "./dom.ts";

export interface Composer {
  readonly element: HTMLElement;
  /** Why the message stands there still: to be shown beside it. */
  readonly waits: Signal<string>;
  /** A message that waits is not sent by itself any more; it stays where it is. */
  hold(): void;
  /** Shows what can be done now; sends what waited for it. */
  refresh(state: { readonly answering: boolean; readonly placeholder: string }): void;
}

export function messageComposer(ask: (text: string) => void, stop: () => void): Composer {
  const input = el("textarea", { rows: 1, placeholder: "Message", aria: { label: "Message" }, name: "message" });
  const sendButton = el(
    "button",
    { type: "submit", class: "icon-button primary", aria: { label: "Send" } },
    icon("send"),
  );
  const stopButton = el(
    "button",
    { type: "button", class: "icon-button", hidden: true, aria: { label: "Stop" }, on: { click: stop } },
    icon("stop"),
  );
  const element = el("form", { class: "composer", aria: { label: "Write a message" } }, input, sendButton, stopButton);
  const waits = new Signal("");
  let isAnswering = false;
  let isWaiting = false;

  const tell = (text: string) => {
    if (text === waits.value) return;
    waits.value = text;
    if (text) announce(text);
  };
  const send = () => {
    const text = input.value;
    if (isAnswering || !text.trim()) return;
    const canAsk = answeredBy() !== undefined;
    isWaiting = !canAsk && isComing();
    tell(canAsk ? "" : isWaiting ? "Sent as soon as the model is ready" : "Open a model first: nothing was sent");
    if (!canAsk) return;
    input.value = "";
    ask(text);
  };

  element.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  const hold = () => {
    isWaiting = false;
    tell("");
  };
  input.addEventListener("input", hold); // who goes on writing sends it again
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || (event.target as HTMLElement).closest("input, textarea, select")) return;
    event.preventDefault();
    input.focus();
  });

  return {
    element,
    waits,
    hold,
    refresh({ answering, placeholder }) {
      isAnswering = answering;
      input.placeholder = placeholder;
      sendButton.disabled = answeredBy() === undefined && !isComing();
      sendButton.hidden = answering;
      stopButton.hidden = !answering;
      if (isWaiting) send();
      else if (answeredBy() !== undefined || loading.value) tell("");
    },
  };
}
