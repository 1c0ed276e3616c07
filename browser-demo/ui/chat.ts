/** The chat: a thread, a composer, and what the last answer cost. */
import { answer, answeredBy } from "../answer.ts";
import { answeringServed, busy, forgetPrompts, isComing, loading, model, report, server, starting } from "../app.ts";
import {
  type Conversation,
  deleteConversation,
  listConversations,
  type Message,
  newConversation,
  openInTab,
  saveConversation,
} from "../conversations.ts";
import { settings } from "../settings.ts";
import { messageComposer } from "./composer.ts";
import { announce, el, Signal } from "./dom.ts";
import { bytes, count } from "./format.ts";
import { type MessageView, messageView } from "./message.ts";
import { modelOffers } from "./models.ts";

export const conversations = new Signal<readonly Conversation[]>([]);
export const current = new Signal<Conversation>(newConversation());
const shownBefore = openInTab.get();

const TITLE_LENGTH = 48;
/** Within this of the end, new text keeps the end in sight. */
const STICK_PIXELS = 80;

const suggestions = {
  chat: ["Explain 4-bit quantization to a gardener", "Write a haiku about rounding errors", "Plan a slow Sunday"],
  text: ["Once upon a time", "Lily and Tom went to the park.", "The little dog was sad because"],
};

/** The model that answers is a base model, which goes on from a text. */
function goesOn(): boolean {
  return answeringServed()?.base ?? model.value?.hasChatTemplate === false;
}

export async function refreshConversations(): Promise<void> {
  conversations.value = await listConversations().catch(() => []);
}

/** A reloaded tab, or one that the browser had put away, shows the conversation that it showed. */
export async function restoreConversation(): Promise<void> {
  await refreshConversations();
  const found = conversations.value.find(({ id }) => id === shownBefore);
  if (found && current.value.messages.length === 0) current.value = found;
}

/** What was computed of its prompts goes with it: that holds its words too. */
export async function removeConversation(id: string): Promise<void> {
  await deleteConversation(id);
  void forgetPrompts();
  if (current.value.id === id) current.value = newConversation();
  await refreshConversations();
}

export function chatView(): HTMLElement {
  const thread = el("div", { class: "thread", role: "log", aria: { label: "Conversation", live: "off" } });
  const scroll = el("div", { class: "scroll", tabIndex: 0, role: "region", aria: { label: "Messages" } }, thread);
  const status = el("div", { class: "status numbers" });
  let views = new Map<Message, MessageView>();
  let control: AbortController | undefined;

  const canAsk = () => answeredBy() !== undefined && control === undefined;
  const stop = () => control?.abort();
  const composer = messageComposer((text) => void ask(text), stop);
  const placeholder = () => {
    if (answeredBy() !== undefined) return goesOn() ? "Begin a text, the model goes on" : "Message";
    return isComing() ? "Message" : "Open a model to start";
  };
  const refresh = () => {
    drawStatus();
    if (current.value.messages.length === 0) drawWelcome();
    composer.refresh({ answering: control !== undefined, placeholder: placeholder() });
  };

  const drawStatus = () => {
    if (composer.waits.value) {
      status.replaceChildren(el("span", {}, composer.waits.value));
      return;
    }
    const last = current.value.messages.at(-1)?.stats;
    const loaded = model.value;
    const served = answeringServed();
    const used = last ? last.promptTokens + last.completionTokens : 0;
    const context = (length: number) => el("span", {}, `Context ${count(used)} of ${count(length)}`);
    if (served || !loaded) {
      const where = served ? "Answers come from the server" : starting.value ? "" : "Nothing you type leaves this page";
      status.replaceChildren(...(served?.contextLength ? [context(served.contextLength)] : []), el("span", {}, where));
      return;
    }
    const { info } = loaded;
    status.replaceChildren(
      context(info.contextLength),
      el("span", {}, `KV cache ${bytes(used * info.memory.kvBytesPerToken)}, ${info.kv.format} ${info.kv.policy}`),
      el("span", { class: "wide" }, loaded.choice.reason),
    );
  };

  const drawWelcome = () => {
    const ready = answeredBy() !== undefined;
    const base = goesOn();
    const privacy = answeringServed()
      ? "What you type goes to this page's server only."
      : "Nothing you type leaves this page.";
    const offers = ready
      ? el(
          "div",
          { class: "suggestions" },
          ...suggestions[base ? "text" : "chat"].map((text) =>
            el("button", { type: "button", class: "button", on: { click: () => void ask(text) } }, text),
          ),
        )
      : modelOffers();
    const lead = ready
      ? base
        ? `This is a small base model: begin a story and it goes on. ${privacy}`
        : `Ask away. ${privacy}`
      : "Pick a model and it is fetched once, checked, and kept in this browser. Then it answers here, offline too, with nothing behind it.";
    thread.replaceChildren(
      el(
        "div",
        { class: "welcome" },
        el("h1", {}, answeringServed() ? "A language model, on this server." : "A language model, in this tab."),
        el("p", {}, lead),
        offers,
      ),
    );
  };

  const toEnd = () => (scroll.scrollTop = scroll.scrollHeight);
  const atEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < STICK_PIXELS;

  const add = (message: Message) => {
    const view = messageView(message, {
      regenerate: () => void again(current.value.messages.indexOf(message)),
      resend: (text) => void again(current.value.messages.indexOf(message), text),
    });
    views.set(message, view);
    thread.append(view.element);
    return view;
  };

  const heading = () => el("h1", { class: "visually-hidden" }, current.value.title);

  const draw = () => {
    views = new Map();
    thread.replaceChildren(heading());
    for (const message of current.value.messages) add(message);
    refresh();
    toEnd();
  };

  const save = async () => {
    const conversation = current.value;
    conversation.updatedAt = Date.now();
    await saveConversation(conversation).catch(() => undefined); // storage is blocked: the chat lives until the page closes
    await refreshConversations();
  };

  /** Asks for an answer to the thread as it stands. */
  const generate = async () => {
    const conversation = current.value;
    const message: Message = { role: "assistant", content: "" };
    const history = [...conversation.messages];
    conversation.messages.push(message);
    const view = add(message);
    control = new AbortController();
    busy.value = true;
    refresh();
    view.update(true);
    toEnd();
    try {
      await answer(
        history,
        message,
        () => {
          const follow = atEnd();
          view.update(true);
          if (follow) requestAnimationFrame(toEnd);
        },
        control.signal,
      );
      announce("Answer finished");
    } catch (error) {
      if (!control.signal.aborted) message.error = report(error);
    }
    control = undefined;
    busy.value = false;
    view.update();
    refresh();
    await save();
  };

  const ask = async (text: string) => {
    if (!canAsk() || !text.trim()) return;
    const conversation = current.value;
    if (conversation.messages.length === 0) {
      conversation.title = text.trim().replace(/\s+/g, " ").slice(0, TITLE_LENGTH);
      thread.replaceChildren(heading());
    }
    const message: Message = { role: "user", content: text };
    conversation.messages.push(message);
    add(message);
    await save();
    await generate();
  };

  /** Cuts the thread at a message: an answer is made again, an edited question replaces itself. */
  const again = async (index: number, text?: string) => {
    if (!canAsk() || index < 0) return;
    const conversation = current.value;
    conversation.messages = conversation.messages.slice(0, index);
    draw();
    if (text === undefined) await generate();
    else await ask(text);
  };

  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    composer.hold();
    stop();
  });

  current.watch(({ id }) => {
    openInTab.set(id);
    composer.hold(); // it was meant for the conversation that was shown
    stop();
    draw();
  });
  composer.waits.watch(drawStatus);
  for (const signal of [model, server, settings, loading, starting]) (signal as Signal<unknown>).watch(refresh);
  return el(
    "section",
    { class: "chat", aria: { label: "Chat" } },
    scroll,
    el("div", { class: "dock" }, composer.element, status),
  );
}
