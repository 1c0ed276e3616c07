/**
 * Tool calls in what a model writes: read as they stream, in each family's spelling (tool-formats.ts), and forced by a
 * grammar. Consumers: the server's converters.
 */
import type { GrammarSpec } from "../grammar/spec.ts";
import { CallScanner } from "./call-scanner.ts";
import { TOOL_FORMATS, type ToolFormat, type ToolFormatName, toolFormatOf } from "./tool-formats.ts";

/** In OpenAI's order: a call's name once, its arguments in fragments that join to JSON, its end. */
export type ToolCallEvent =
  | { readonly kind: "text"; readonly text: string }
  | { readonly kind: "call"; readonly index: number; readonly name: string }
  | { readonly kind: "arguments"; readonly index: number; readonly text: string }
  | { readonly kind: "end"; readonly index: number };

export interface Tool {
  readonly name: string;
  /** JSON Schema of the arguments. */
  readonly parameters: unknown;
}

/**
 * Reads the calls that a model chose to make (tool_choice "auto"). Marks such as [TOOL_CALLS] are special tokens:
 * generate with keepSpecialTokens.
 */
export function toolCallParser(template: string | undefined, tools: readonly Tool[]): ToolCallParser {
  return new ToolCallParser(toolFormatOf(template), tools, false);
}

export interface ForcedCalls {
  /** Goes behind the rendered prompt: the constrained answer begins after it. */
  readonly promptSuffix: string;
  readonly grammar: GrammarSpec;
  /** Of what is generated. */
  readonly parser: ToolCallParser;
}

/**
 * Makes the answer one call (or, with `many`, one and more) of the tools given: all for tool_choice "required", one for
 * a named function. A prompt that left the model thinking is closed first.
 */
export function forceToolCalls(
  template: string | undefined,
  prompt: string,
  tools: readonly Tool[],
  many: boolean,
): ForcedCalls {
  const name = toolFormatOf(template);
  const format: ToolFormat = TOOL_FORMATS[name];
  const thoughts = prompt.trimEnd().endsWith("<think>") ? "\n</think>\n\n" : "";
  return {
    promptSuffix: thoughts + (format.open === "" ? "" : format.open + format.padding),
    grammar: {
      kind: "tool_calls",
      format: name,
      tools: tools.map(({ name, parameters }) => ({ name, parameters })),
      many,
    },
    parser: new ToolCallParser(name, tools, true),
  };
}

const FENCE = /^```(?:json|tool_call|tool_calls)?[ \t]*\n?/;
const MAYBE_FENCE = /^`{0,2}$|^```[a-z_]*[ \t]*$/;

/** Text in, events out, nothing held back longer than it can still become a call. */
export class ToolCallParser {
  readonly #format: ToolFormat;
  readonly #names: ReadonlySet<string>;
  #held = ""; // not yet given out
  #calls = 0;
  #mode: "start" | "text" | "calls" | "call" | "closing";
  #scanner: CallScanner | undefined;
  #raw = ""; // of the call being read, for when it turns out to be none
  #bare: boolean; // no mark says that this is a call: its JSON must
  #fenced = false;
  #list = false;

  constructor(format: ToolFormatName, tools: readonly Tool[], opened: boolean) {
    this.#format = TOOL_FORMATS[format];
    this.#names = new Set(tools.map(({ name }) => name));
    this.#bare = opened ? this.#format.open === "" : true;
    this.#mode = opened ? "calls" : "start";
  }

  /** Calls seen so far. */
  get calls(): number {
    return this.#calls;
  }

  push(text: string): ToolCallEvent[] {
    this.#held += text;
    const events: ToolCallEvent[] = [];
    while (this.#step(events));
    return events;
  }

  end(): ToolCallEvent[] {
    const events = this.push("");
    if (this.#mode === "call" && this.#scanner?.name === undefined) this.#text(events, this.#raw);
    else if (this.#mode === "text" || this.#mode === "start") this.#text(events, this.#held);
    this.#held = "";
    return events;
  }

  #text(events: ToolCallEvent[], text: string): void {
    if (text !== "") events.push({ kind: "text", text });
  }

  /** One move of the state; false when more text is needed. */
  #step(events: ToolCallEvent[]): boolean {
    switch (this.#mode) {
      case "start":
        return this.#start();
      case "text":
        return this.#plain(events);
      case "calls":
        return this.#nextCall(events);
      case "call":
        return this.#call(events);
      case "closing":
        return this.#close();
    }
  }

  /**
   * Before anything was written: bare or fenced JSON may be a call, whatever the family's format (Qwen2.5-Coder leaves
   * its tags out).
   */
  #start(): boolean {
    const text = this.#held.trimStart();
    if (text === "") return false;
    if (MAYBE_FENCE.test(text) && text !== "") return false;
    const tag = "<|python_tag|>";
    if (tag.startsWith(text) && text !== tag) return false;
    const begun = text.startsWith(tag) ? text.slice(tag.length) : text;
    const fence = FENCE.exec(begun);
    const body = fence ? begun.slice(fence[0].length).trimStart() : begun.trimStart();
    if (body === "") return false;
    if (!body.startsWith("{") && !(body.startsWith("[") && !this.#format.open.startsWith("["))) {
      this.#mode = "text";
      return true;
    }
    this.#fenced = fence !== null;
    this.#raw = this.#held.slice(0, this.#held.length - body.length);
    this.#held = body;
    this.#mode = "calls";
    return true;
  }

  /** Plain text up to an opening mark; blanks before one belong to it. */
  #plain(events: ToolCallEvent[]): boolean {
    const { open } = this.#format;
    const at = open === "" ? -1 : this.#held.indexOf(open);
    if (at >= 0) {
      this.#text(events, this.#held.slice(0, at).trimEnd());
      this.#held = this.#held.slice(at + open.length);
      this.#raw = open;
      this.#bare = false;
      this.#mode = "calls";
      return true;
    }
    let ready = this.#held.length;
    if (open !== "") {
      ready -= partialEnd(this.#held, open);
      ready = this.#held.slice(0, ready).trimEnd().length;
    }
    this.#text(events, this.#held.slice(0, ready));
    this.#held = this.#held.slice(ready);
    return false;
  }

  /** Where a call may begin: after the mark, or after another call in a list. */
  #nextCall(events: ToolCallEvent[]): boolean {
    const text = this.#held.replace(/^[\s,;]+/, "");
    if (text === "") return false;
    this.#raw += this.#held.slice(0, this.#held.length - text.length);
    this.#held = text;
    if (text.startsWith("[") && !this.#list) {
      this.#list = true;
      this.#raw += "[";
      this.#held = text.slice(1);
      return true;
    }
    if (text.startsWith("]") && this.#list) {
      this.#list = false;
      this.#held = text.slice(1);
      this.#mode = "closing";
      return true;
    }
    if (text.startsWith("{")) {
      this.#scanner = new CallScanner(undefined, this.#bare);
      this.#mode = "call";
      return true;
    }
    // Mistral since 2024-11: [TOOL_CALLS]name[ARGS]{...}
    const newer = /^([\w.-]+)(?:\[CALL_ID\][\w-]*)?\[ARGS\]/.exec(text);
    if (newer) {
      this.#held = text.slice(newer[0].length);
      this.#raw += newer[0];
      this.#scanner = new CallScanner(newer[1]);
      this.#mode = "call";
      return true;
    }
    if (this.#format.open === "[TOOL_CALLS]" && /^[\w.-]+(?:\[[A-Z_]*\]?[\w-]*)*$/.test(text)) return false;
    // Not a call after all.
    if (this.#calls === 0) this.#text(events, this.#raw);
    this.#list = false;
    this.#raw = "";
    this.#mode = "text";
    return true;
  }

  #call(events: ToolCallEvent[]): boolean {
    if (this.#held === "") return false;
    const scanner = this.#scanner!;
    const named = scanner.begun;
    const { read, fragment } = scanner.push(this.#held);
    this.#raw += this.#held.slice(0, read);
    this.#held = this.#held.slice(read);
    // Bare JSON is a call only if it names a tool and has arguments.
    const isCall = scanner.begun && (!this.#bare || this.#names.has(scanner.name!));
    if (
      scanner.failed ||
      (scanner.begun && !isCall) ||
      (scanner.done && !isCall && (this.#bare || scanner.name === undefined))
    ) {
      if (named) return this.#abandon();
      this.#text(events, this.#raw);
      this.#list = false;
      this.#raw = "";
      this.#mode = "text";
      return true;
    }
    const index = this.#calls;
    if (isCall && !named) events.push({ kind: "call", index, name: scanner.name! });
    if (fragment !== "") events.push({ kind: "arguments", index, text: fragment });
    if (!scanner.done) return this.#held !== "";
    if (!scanner.begun) {
      // A marked call without arguments.
      events.push({ kind: "call", index, name: scanner.name! }, { kind: "arguments", index, text: "{}" });
    }
    events.push({ kind: "end", index });
    this.#calls++;
    this.#raw = "";
    this.#mode = this.#list || this.#format.close === "" ? "calls" : "closing";
    if (this.#bare && !this.#list) this.#mode = "closing";
    return true;
  }

  /** Broken after its name was given out: what was sent stays, the rest is dropped. */
  #abandon(): boolean {
    this.#calls++;
    this.#raw = "";
    this.#mode = "text";
    return true;
  }

  /** After a call: its closing mark, a fence, or another call. */
  #close(): boolean {
    const text = this.#held.trimStart();
    const marks = [this.#format.close, this.#fenced ? "```" : ""].filter((mark) => mark !== "");
    for (const mark of marks) {
      if (text.startsWith(mark)) {
        this.#held = text.slice(mark.length);
        this.#fenced = false;
        this.#mode = "text";
        return true;
      }
      if (mark.startsWith(text)) return false;
    }
    if (text === "") return false;
    if (this.#bare && /^[,;{]/.test(text)) {
      this.#mode = "calls";
      return true;
    }
    this.#mode = "text";
    return true;
  }
}

/** How many characters at the end of a text could begin a mark. */
function partialEnd(text: string, mark: string): number {
  for (let length = Math.min(mark.length - 1, text.length); length > 0; length--)
    if (mark.startsWith(text.slice(-length))) return length;
  return 0;
}
