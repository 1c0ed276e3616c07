/** Reads one call's JSON object as it streams: its name, and its arguments as the very text the model wrote. */

type State = "open" | "key" | "colon" | "value" | "after" | "done" | "failed";

const CALL_KEYS = new Set(["name", "arguments", "parameters", "id", "type"]);

export class CallScanner {
  /** Known once its string is closed. */
  name: string | undefined;
  #state: State = "open";
  #key = "";
  #value: ValueReader | undefined;
  #early = ""; // arguments that came before the name
  #hasArguments = false;
  readonly #alone: boolean;

  readonly #strict: boolean;

  /** With a name, the object is the arguments themselves; `strict`: a key that calls do not have ends it at once. */
  constructor(name?: string, strict = false) {
    this.name = name;
    this.#strict = strict;
    this.#alone = name !== undefined;
    if (this.#alone) this.#state = "value";
  }

  /** Name and the first of the arguments are there. */
  get begun(): boolean {
    return this.name !== undefined && this.#hasArguments;
  }
  get done(): boolean {
    return this.#state === "done";
  }
  get failed(): boolean {
    return this.#state === "failed";
  }

  /** How much was read (the rest comes after the object) and what it adds to the arguments. */
  push(text: string): { read: number; fragment: string } {
    let fragment = "";
    let at = 0;
    while (at < text.length && this.#state !== "done" && this.#state !== "failed") {
      const char = text[at];
      if (this.#value !== undefined) {
        const taken = this.#value.push(char);
        if (this.#isArguments()) fragment += this.#value.take();
        if (taken) at++;
        if (this.#value.done) this.#finishValue();
        continue;
      }
      at++;
      if (/\s/.test(char)) continue;
      this.#next(char);
      if (this.#value !== undefined) at--; // the value reads its own first character
    }
    if (this.name === undefined || !this.#hasArguments) {
      this.#early += fragment;
      return { read: at, fragment: "" };
    }
    fragment = this.#early + fragment;
    this.#early = "";
    return { read: at, fragment };
  }

  #isArguments(): boolean {
    return this.#alone || ((this.#key === "arguments" || this.#key === "parameters") && this.#state === "value");
  }

  #next(char: string): void {
    const expected: Partial<Record<State, string>> = { open: "{", colon: ":" };
    if (this.#state === "open" && char === "{") this.#state = "key";
    else if (this.#state === "key" && char === '"') this.#value = new ValueReader();
    else if (this.#state === "key" && char === "}") this.#state = "done";
    else if (this.#state === "colon" && char === ":") this.#state = "value";
    else if (this.#state === "value") {
      this.#value = new ValueReader();
      if (this.#isArguments()) this.#hasArguments = true;
    } else if (this.#state === "after" && char === ",") this.#state = "key";
    else if (this.#state === "after" && char === "}") this.#state = "done";
    else this.#state = expected[this.#state] === char ? this.#state : "failed";
  }

  #finishValue(): void {
    const text = this.#value!.text;
    this.#value = undefined;
    if (this.#state === "key") {
      this.#key = parsedString(text) ?? "";
      this.#state = this.#strict && !CALL_KEYS.has(this.#key) ? "failed" : "colon";
      return;
    }
    if (this.#alone) {
      this.#state = "done";
      return;
    }
    if (this.#key === "name") this.name = parsedString(text);
    this.#state = this.#key === "name" && this.name === undefined ? "failed" : "after";
  }
}

function parsedString(text: string): string | undefined {
  try {
    const value: unknown = JSON.parse(text);
    return typeof value === "string" ? value : undefined;
  } catch {
    return undefined;
  }
}

/** One JSON value, character by character: where it ends, and its text. Strings are kept whole: see `take`. */
class ValueReader {
  text = "";
  done = false;
  #given = 0;
  #depth = 0;
  #inString = false;
  #escaped = false;

  /** False where the character no longer belongs to the value (a number has no end of its own). */
  push(char: string): boolean {
    if (this.#inString) {
      this.text += char;
      if (this.#escaped) this.#escaped = false;
      else if (char === "\\") this.#escaped = true;
      else if (char === '"') {
        this.#inString = false;
        this.done = this.#depth === 0;
      }
      return true;
    }
    if (this.#depth === 0 && this.text !== "" && /[\s,}\]]/.test(char)) {
      this.done = true;
      return false;
    }
    this.text += char;
    if (char === '"') this.#inString = true;
    else if (char === "{" || char === "[") this.#depth++;
    else if (char === "}" || char === "]") {
      this.#depth--;
      this.done = this.#depth <= 0;
    }
    return true;
  }

  /** What is new, to be passed on; arguments written as a string that holds JSON are passed on unpacked, at the end. */
  take(): string {
    if (this.text.startsWith('"')) return this.done ? (parsedString(this.text) ?? "") : "";
    const fresh = this.text.slice(this.#given);
    this.#given = this.text.length;
    return fresh;
  }
}
