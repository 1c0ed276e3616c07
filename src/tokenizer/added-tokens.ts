/** Finds added tokens in text before anything else happens to it, as `tokenizers` 0.23 does: leftmost, then longest. */

export interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly single_word?: boolean;
  readonly lstrip?: boolean;
  readonly rstrip?: boolean;
  readonly normalized?: boolean;
  readonly special?: boolean;
}

interface Node {
  readonly next: Map<number, Node>;
  token?: AddedToken;
}

const node = (): Node => ({ next: new Map() });
const WORD_END = /[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}]$/u; // Rust's \w
const WORD_START = /^[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}]/u;

/** Splits text into strings and added tokens. */
export class AddedTokenSplitter {
  readonly #root = node();

  /** `spelled` is what is looked for: the content, or its normalized form. */
  constructor(tokens: Iterable<{ readonly token: AddedToken; readonly spelled: string }>) {
    for (const { token, spelled } of tokens) {
      if (spelled === "") continue;
      let at = this.#root;
      for (let i = 0; i < spelled.length; i++) {
        const code = spelled.charCodeAt(i);
        let next = at.next.get(code);
        if (next === undefined) at.next.set(code, (next = node()));
        at = next;
      }
      at.token ??= token;
    }
  }

  split(text: string): (string | AddedToken)[] {
    if (this.#root.next.size === 0) return text === "" ? [] : [text];
    const parts: (string | AddedToken)[] = [];
    let done = 0; // everything before is in parts
    let i = 0;
    while (i < text.length) {
      let at = this.#root.next.get(text.charCodeAt(i));
      if (at === undefined) {
        i++;
        continue;
      }
      let token: AddedToken | undefined;
      let end = i;
      for (let j = i + 1; at !== undefined; j++) {
        if (at.token !== undefined) {
          token = at.token;
          end = j;
        }
        at = j < text.length ? at.next.get(text.charCodeAt(j)) : undefined;
      }
      if (token === undefined) {
        i++;
        continue;
      }
      if (token.single_word && (WORD_END.test(text.slice(Math.max(0, i - 2), i)) || WORD_START.test(text.slice(end)))) {
        i = end;
        continue;
      }
      let start = i;
      let stop = end;
      if (token.lstrip) start = Math.max(done, text.slice(0, start).trimEnd().length);
      if (token.rstrip) stop = text.length - text.slice(stop).trimStart().length;
      if (start > done) parts.push(text.slice(done, start));
      if (start >= done) parts.push(token);
      done = stop;
      i = Math.max(end, stop);
    }
    if (done < text.length) parts.push(text.slice(done));
    return parts;
  }
}
