/**
 * Runs a grammar byte by byte: a pushdown automaton whose sets of stacks are interned as numbered states, with
 * transitions filled in when first taken. A stack is a chain of frames (node, progress, frame below); equal chains
 * are one frame, so recursion costs memory only for depths really reached.
 */
import { NibbleError } from "../errors.ts";
import type { Node, Rule } from "./nodes.ts";

/** Nothing continues from here. */
export const DEAD = 0;
const UNKNOWN = -1;
const END = 0; // the frame below the whole grammar

/** Distinct states before a grammar is given up; a 20,000-token answer in a deep schema needs some thousands. */
const MAX_STATES = 200_000;

/** What masks are computed from: numbered states and their transitions by byte class. */
export interface Automaton {
  readonly start: number;
  readonly classOf: Uint8Array;
  readonly classes: number;
  readonly transitions: Int32Array;
  readonly stateCount: number;
  accepts(state: number): boolean;
  plainRun(state: number): number;
  plainOnly(state: number): boolean;
  next(state: number, byte: number): number;
  step(state: number, byteClass: number): number;
}

export class Machine implements Automaton {
  readonly start: number;
  /** Bytes that no terminal tells apart share a class. */
  readonly classOf = new Uint8Array(256);
  readonly classes: number;
  /** transitions[state * classes + class]: the next state, or UNKNOWN. */
  transitions: Int32Array;
  readonly #terminals: Uint8Array[] = []; // per terminal, per class: 1 where allowed
  readonly #terminalOf = new Map<Node, number>();
  readonly #nodes: Node[] = [];
  /** Nodes that some text matches: the others (a property that is `false`) are no way to go. */
  readonly #productive: ReadonlySet<Node>;
  readonly #idOf = new Map<Node, number>();

  readonly #frameNode: number[] = [0];
  readonly #frameAt: number[] = [0];
  readonly #frameBelow: number[] = [0];
  readonly #frames = new Map<number, Map<number, number>>();

  readonly #states: (readonly number[])[] = [[]]; // frames of terminals
  readonly #accepts: boolean[] = [false];
  readonly #stateOf = new Map<string, number>();

  constructor(root: Node) {
    this.#number(root);
    checkLeftRecursion(this.#nodes);
    this.#productive = closeOver(this.#nodes, (node, has) => {
      if (node.kind === "bytes") return node.set.includes(1);
      if (node.kind === "seq") return node.items.every(has);
      if (node.kind === "alt") return node.items.some(has);
      return node.kind === "ref" ? has(bodyOf(node.rule)) : node.min === 0 || has(node.item);
    });
    this.classes = this.#classifyBytes();
    this.transitions = new Int32Array(64 * this.classes).fill(UNKNOWN);
    this.transitions.fill(DEAD, 0, this.classes);
    const found = new Set<number>();
    this.start = this.#state(
      found,
      withinStack(() => this.#expand(root, END, found, new Set())),
    );
  }

  get stateCount(): number {
    return this.#states.length;
  }

  /** The bytes so far are a whole sentence. */
  accepts(state: number): boolean {
    return this.#accepts[state];
  }

  /** How many characters of a JSON string's plain kind may come from here on, whichever they are. */
  plainRun(state: number): number {
    let most = 0;
    for (const frame of this.#states[state]) {
      const below = this.#frameBelow[frame];
      const node = this.#nodes[this.#frameNode[below]];
      const terminal = this.#nodes[this.#frameNode[frame]];
      // A blank tells the first byte of a character from those that go on with one or with an escape.
      if (below === END || node.kind !== "repeat" || !node.plain || terminal.kind !== "bytes" || !terminal.set[32])
        continue;
      most = Math.max(most, node.max - this.#frameAt[below] + 1); // the frame counts this character already
    }
    return most;
  }

  /** Plain characters may come here as those of such runs, and in no other way. */
  plainOnly(state: number): boolean {
    return this.#states[state].every((frame) => {
      const node = this.#nodes[this.#frameNode[frame]];
      if (node.kind !== "bytes") return false;
      const plain = plainBytes(node.set);
      if (plain === "none") return true; // a quote, the beginning of an escape
      let below = this.#frameBelow[frame];
      // where a longer character begins; in the middle of one no token of whole characters fits, in an escape some do
      const longer = plain === "beyond ASCII" && this.#nodes[this.#frameNode[below]].kind === "seq";
      if (!longer && !node.set[32]) return false;
      if (longer) below = this.#frameBelow[below];
      const over = this.#nodes[this.#frameNode[below]];
      return below !== END && over.kind === "repeat" && over.plain === true;
    });
  }

  /** Some array of the grammar has to have distinct items. */
  get hasDistinct(): boolean {
    return this.#nodes.some((node) => node.kind === "bytes" && node.distinct);
  }

  /** The bracket that may come here opens one. */
  opensDistinct(state: number): boolean {
    return this.#states[state].some((frame) => {
      const node = this.#nodes[this.#frameNode[frame]];
      return node.kind === "bytes" && node.distinct;
    });
  }

  next(state: number, byte: number): number {
    const known = this.transitions[state * this.classes + this.classOf[byte]];
    return known === UNKNOWN ? this.step(state, this.classOf[byte]) : known;
  }

  /** Fills in one transition. */
  step(state: number, byteClass: number): number {
    const found = new Set<number>();
    const seen = new Set<number>();
    const accepts = withinStack(() => {
      let ends = false;
      for (const frame of this.#states[state]) {
        const terminal = this.#terminals[this.#terminalOf.get(this.#nodes[this.#frameNode[frame]])!];
        if (terminal[byteClass] === 1) ends = this.#pop(this.#frameBelow[frame], found, seen) || ends;
      }
      return ends;
    });
    const next = this.#state(found, accepts);
    this.transitions[state * this.classes + byteClass] = next;
    return next;
  }

  #number(root: Node): void {
    const waiting = [root];
    while (waiting.length > 0) {
      const node = waiting.pop()!;
      if (this.#idOf.has(node)) continue;
      this.#idOf.set(node, this.#nodes.length);
      this.#nodes.push(node);
      if (node.kind === "seq" || node.kind === "alt") waiting.push(...node.items);
      else if (node.kind === "repeat") waiting.push(node.item);
      else if (node.kind === "ref") waiting.push(bodyOf(node.rule));
    }
  }

  #classifyBytes(): number {
    const sets = new Map<string, number>();
    const distinct: Uint8Array[] = [];
    for (const node of this.#nodes) {
      if (node.kind !== "bytes") continue;
      const key = node.set.join("");
      if (!sets.has(key)) {
        sets.set(key, distinct.length);
        distinct.push(node.set);
      }
      this.#terminalOf.set(node, sets.get(key)!);
    }
    const classes = new Map<string, number>();
    const sample: number[] = [];
    for (let byte = 0; byte < 256; byte++) {
      const key = distinct.map((set) => set[byte]).join("");
      if (!classes.has(key)) {
        classes.set(key, classes.size);
        sample.push(byte);
      }
      this.classOf[byte] = classes.get(key)!;
    }
    for (const set of distinct) this.#terminals.push(Uint8Array.from(sample, (byte) => set[byte]));
    return classes.size;
  }

  #frame(node: Node, at: number, below: number): number {
    let over = this.#frames.get(below);
    if (over === undefined) this.#frames.set(below, (over = new Map()));
    const key = this.#idOf.get(node)! * 2 ** 32 + at; // at: an index or a count, below 2^32
    let frame = over.get(key);
    if (frame === undefined) {
      frame = this.#frameNode.length;
      over.set(key, frame);
      this.#frameNode.push(this.#idOf.get(node)!);
      this.#frameAt.push(at);
      this.#frameBelow.push(below);
    }
    return frame;
  }

  /** Adds the terminals that may come first; true if the whole grammar may end here. */
  #expand(node: Node, below: number, found: Set<number>, seen: Set<number>): boolean {
    if (!this.#productive.has(node)) return false;
    switch (node.kind) {
      case "bytes":
        found.add(this.#frame(node, 0, below));
        return false;
      case "seq":
        return this.#sequence(node, 0, below, found, seen);
      case "repeat":
        return this.#repeat(node, 0, below, found, seen);
      case "alt": {
        if (!this.#first(node, 0, below, seen)) return false;
        let accepts = false;
        for (const item of node.items) accepts = this.#expand(item, below, found, seen) || accepts;
        return accepts;
      }
      case "ref":
        return this.#first(node, 0, below, seen) && this.#expand(bodyOf(node.rule), below, found, seen);
    }
  }

  /** Not yet expanded in this closure. */
  #first(node: Node, at: number, below: number, seen: Set<number>): boolean {
    const frame = this.#frame(node, at, below);
    if (seen.has(frame)) return false;
    seen.add(frame);
    return true;
  }

  #sequence(node: Node & { kind: "seq" }, at: number, below: number, found: Set<number>, seen: Set<number>): boolean {
    if (at === node.items.length) return this.#pop(below, found, seen);
    // The last item needs no frame of its own: right recursion stays flat.
    const inner = at + 1 === node.items.length ? below : this.#frame(node, at + 1, below);
    return this.#expand(node.items[at], inner, found, seen);
  }

  #repeat(
    node: Node & { kind: "repeat" },
    done: number,
    below: number,
    found: Set<number>,
    seen: Set<number>,
  ): boolean {
    if (!this.#first(node, done, below, seen)) return false;
    let accepts = false;
    if (done >= node.min) accepts = this.#pop(below, found, seen);
    if (done < node.max && this.#productive.has(node.item)) {
      // Without a maximum, counting ends at the minimum, so that the loop is a single state.
      const count = node.max === Number.POSITIVE_INFINITY ? Math.min(done + 1, node.min) : done + 1;
      accepts = this.#expand(node.item, this.#frame(node, count, below), found, seen) || accepts;
    }
    return accepts;
  }

  #pop(frame: number, found: Set<number>, seen: Set<number>): boolean {
    if (frame === END) return true;
    const node = this.#nodes[this.#frameNode[frame]];
    const at = this.#frameAt[frame];
    const below = this.#frameBelow[frame];
    if (node.kind === "seq") return this.#sequence(node, at, below, found, seen);
    if (node.kind === "repeat") return this.#repeat(node, at, below, found, seen);
    throw new NibbleError("engine", `grammar: a ${node.kind} cannot be resumed`);
  }

  #state(found: Set<number>, accepts: boolean): number {
    if (found.size === 0 && !accepts) return DEAD;
    const frames = [...found].sort((a, b) => a - b);
    const key = `${accepts ? "!" : ""}${frames.join(",")}`;
    const known = this.#stateOf.get(key);
    if (known !== undefined) return known;
    const state = this.#states.length;
    if (state >= MAX_STATES)
      throw new NibbleError("unsupported", `The grammar needs more than ${MAX_STATES} states; simplify it.`);
    this.#states.push(frames);
    this.#accepts.push(accepts);
    this.#stateOf.set(key, state);
    if ((state + 1) * this.classes > this.transitions.length) {
      const larger = new Int32Array(this.transitions.length * 2).fill(UNKNOWN);
      larger.set(this.transitions);
      this.transitions = larger;
    }
    return state;
  }
}

type PlainBytes = "none" | "beyond ASCII" | "some";
const plainSets = new WeakMap<Uint8Array, PlainBytes>();

/** Which bytes of the set may be part of a JSON string as they are. */
function plainBytes(set: Uint8Array): PlainBytes {
  let known = plainSets.get(set);
  if (known === undefined) {
    const ascii = set.some((allowed, byte) => allowed === 1 && byte >= 32 && byte < 128 && byte !== 34 && byte !== 92);
    known = ascii ? "some" : set.includes(1, 128) ? "beyond ASCII" : "none";
    plainSets.set(set, known);
  }
  return known;
}

/** The closure recurses: an absurd grammar, (a?){10000}, ends with a refusal instead of the call stack. */
function withinStack<Result>(work: () => Result): Result {
  try {
    return work();
  } catch (error) {
    if (!(error instanceof RangeError)) throw error;
    throw new NibbleError("unsupported", "The grammar nests or repeats what may be empty too deeply.", {
      cause: error,
    });
  }
}

function bodyOf(rule: Rule): Node {
  if (rule.body === undefined) throw new NibbleError("bad_option", `grammar: rule "${rule.name}" is not defined.`);
  return rule.body;
}

/** The least set of nodes that contains every node for which the test, given the set, holds. */
function closeOver(nodes: readonly Node[], test: (node: Node, has: (item: Node) => boolean) => boolean): Set<Node> {
  const set = new Set<Node>();
  const has = (item: Node) => set.has(item);
  for (let size = -1; size !== set.size; ) {
    size = set.size;
    // From the leaves, which #number puts last, to the root: few rounds are needed.
    for (let i = nodes.length - 1; i >= 0; i--) if (!set.has(nodes[i]) && test(nodes[i], has)) set.add(nodes[i]);
  }
  return set;
}

/** A rule that can begin with itself would grow its stack without reading anything. */
function checkLeftRecursion(nodes: readonly Node[]): void {
  const nullable = closeOver(nodes, (node, has) => {
    if (node.kind === "seq") return node.items.every(has);
    if (node.kind === "alt") return node.items.some(has);
    if (node.kind === "ref") return has(bodyOf(node.rule));
    return node.kind === "repeat" && (node.min === 0 || has(node.item));
  });
  const done = new Set<Node>();
  const open = new Set<Node>();
  const visit = (node: Node): void => {
    if (done.has(node)) return;
    if (open.has(node)) {
      const name = node.kind === "ref" ? node.rule.name : node.kind;
      throw new NibbleError("unsupported", `grammar: rule "${name}" is left-recursive; write it with a repetition.`);
    }
    open.add(node);
    if (node.kind === "ref") visit(bodyOf(node.rule));
    else if (node.kind === "repeat") visit(node.item);
    else if (node.kind === "alt") node.items.forEach(visit);
    else if (node.kind === "seq")
      for (const item of node.items) {
        visit(item);
        if (!nullable.has(item)) break;
      }
    open.delete(node);
    done.add(node);
  };
  nodes.forEach(visit);
}
