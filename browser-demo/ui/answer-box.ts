/** One column of Compare: what was said, where it departs from the first, and its figures. */
import { el } from "./dom.ts";
import { rate } from "./format.ts";

/** A greedy answer, token by token. */
export interface Result {
  readonly ids: readonly number[];
  /** Characters after each id, so that the text up to a token is known. */
  readonly ends: readonly number[];
  readonly text: string;
}

export interface AnswerBox {
  readonly text: HTMLElement;
  readonly facts: HTMLElement;
  show(rows: readonly (readonly [string, string])[]): void;
  /** Marks everything from this character on. */
  mark(result: Result, from: number): void;
  clear(): void;
}

export function answerBox(label: string): AnswerBox {
  const text = el("div", { class: "answer", role: "region", tabIndex: 0, aria: { label } });
  const facts = el("dl", { class: "facts numbers" });
  return {
    text,
    facts,
    show: (rows) =>
      facts.replaceChildren(...rows.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    mark({ text: said }, from) {
      text.replaceChildren(said.slice(0, from));
      if (from < said.length) text.append(el("mark", {}, said.slice(from)));
    },
    clear() {
      text.replaceChildren();
      facts.replaceChildren();
    },
  };
}

/** Tokens per second after the first one, which belongs to the prompt. */
export function speed(tokens: number, decodeMs: number): string {
  return tokens > 1 && decodeMs > 0 ? `${rate(((tokens - 1) * 1000) / decodeMs)} tok/s` : "one token only";
}

export interface Agreement {
  /** Tokens that both say before they part. */
  readonly tokens: number;
  /** The character where they part; undefined where they say the same to the end. */
  readonly from: number | undefined;
}

export function agreement(one: Result, two: Result): Agreement {
  const shorter = Math.min(one.ids.length, two.ids.length);
  let tokens = 0;
  while (tokens < shorter && one.ids[tokens] === two.ids[tokens]) tokens++;
  if (tokens === one.ids.length && tokens === two.ids.length) return { tokens, from: undefined };
  return { tokens, from: tokens === 0 ? 0 : Math.min(one.ends[tokens - 1], two.ends[tokens - 1]) };
}

export function verdictOf({ tokens, from }: Agreement, one: string, two: string): string {
  const count = `${tokens} ${tokens === 1 ? "token" : "tokens"}`;
  return from === undefined ? `${one} and ${two} say the same ${count}.` : `${one} and ${two} part after ${count}.`;
}
