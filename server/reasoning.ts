/** Splits what a thinking model writes into its thoughts (`<think> ... </think>`) and its answer, as it streams. */

export interface Part {
  readonly kind: "reasoning" | "text";
  readonly text: string;
}

const OPEN = "<think>";
const CLOSE = "</think>";

/** Whether a template writes thoughts at all, and whether this prompt already opened them. */
export function thinkingState(template: string | undefined, prompt: string): "never" | "open" | "maybe" {
  if (!template?.includes(CLOSE)) return "never";
  return prompt.trimEnd().endsWith(OPEN) ? "open" : "maybe";
}

export class ReasoningSplitter {
  private held = "";
  private state: "start" | "thinking" | "after" | "answer";

  constructor(state: "never" | "open" | "maybe") {
    this.state = state === "open" ? "thinking" : state === "maybe" ? "start" : "answer";
  }

  push(text: string): Part[] {
    this.held += text;
    const parts: Part[] = [];
    if (this.state === "start") {
      const begun = this.held.trimStart();
      if (OPEN.startsWith(begun.slice(0, OPEN.length)) && begun.length < OPEN.length) return parts;
      if (begun.startsWith(OPEN)) {
        this.held = begun.slice(OPEN.length);
        this.state = "thinking";
      } else this.state = "answer";
    }
    if (this.state === "thinking") {
      const end = this.held.indexOf(CLOSE);
      const ready = end < 0 ? this.held.length - partialEnd(this.held, CLOSE) : end;
      if (ready > 0) parts.push({ kind: "reasoning", text: this.held.slice(0, ready) });
      this.held = this.held.slice(end < 0 ? ready : end + CLOSE.length);
      if (end >= 0) this.state = "after";
    }
    if (this.state === "after") {
      this.held = this.held.trimStart(); // the blank line that templates put between thoughts and answer
      if (this.held !== "") this.state = "answer";
    }
    if (this.state === "answer" && this.held !== "") {
      parts.push({ kind: "text", text: this.held });
      this.held = "";
    }
    return parts;
  }

  end(): Part[] {
    const kind = this.state === "thinking" ? "reasoning" : "text";
    const text = this.state === "after" ? "" : this.held;
    this.held = "";
    return text === "" ? [] : [{ kind, text }];
  }

  get thinking(): boolean {
    return this.state === "thinking";
  }
}

/** How many characters at the end of `text` could begin `mark`. */
export function partialEnd(text: string, mark: string): number {
  for (let length = Math.min(mark.length - 1, text.length); length > 0; length--) {
    if (mark.startsWith(text.slice(-length))) return length;
  }
  return 0;
}
