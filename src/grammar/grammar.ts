/** Constrained decoding: a grammar and a tokenizer give, after every token, the set of tokens that may follow. */
import { NibbleError } from "../errors.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { DistinctMachine, type Items } from "./distinct.ts";
import { parseGrammar } from "./ebnf.ts";
import { anyObject, schemaToGrammar } from "./json-schema.ts";
import { type Automaton, DEAD, Machine } from "./machine.ts";
import { literal, type Node, optional, seq } from "./nodes.ts";
import { parseRegex } from "./regex.ts";
import type { GrammarSpec, TokenConstraint } from "./spec.ts";
import { toolCalls } from "./tool-calls.ts";
import { type Vocabulary, vocabularyOf } from "./vocabulary.ts";

/** Masks kept per grammar: 256 of 152k tokens are 5 MB. */
const MASK_CACHE = 256;
const CACHED_GRAMMARS = 32;
/** A machine whose transitions have grown beyond this (16 MB) is made anew for the next answer. */
const RENEW_CELLS = 4_000_000;

export interface CompiledGrammar {
  /** At the beginning of an answer; one grammar serves many answers. */
  start(): TokenConstraint;
}

/** Compiles a grammar for a tokenizer; errors: `bad_option` for what is malformed, `unsupported` for what is left out. */
export function compileGrammar(spec: GrammarSpec, tokenizer: Tokenizer): CompiledGrammar {
  const text = grammarNode(spec);
  const vocabulary = vocabularyOf(tokenizer);
  let machine = machineOf(text);
  let root = text;
  if (vocabulary.dropsSpace) {
    // The space that decoding drops may come first; where the text itself may begin with one, it must.
    const space = literal(" ");
    root = seq(machine.next(machine.start, 32) === DEAD ? optional(space) : space, text);
    machine = machineOf(root);
  }
  let masks = new Map<number, Uint32Array>();
  return {
    start() {
      if (machine.stateCount * machine.classes > RENEW_CELLS) {
        machine = machineOf(root);
        masks = new Map();
      }
      return new GrammarConstraint(machine, masks, vocabulary);
    },
  };
}

/** Compiled grammars of one tokenizer by their text: clients send the same schema again and again. */
export class GrammarCache {
  readonly #tokenizer: Tokenizer;
  readonly #compiled = new Map<string, CompiledGrammar>();

  constructor(tokenizer: Tokenizer) {
    this.#tokenizer = tokenizer;
  }

  /** A constraint at the beginning of an answer. */
  start(spec: GrammarSpec): TokenConstraint {
    const key = JSON.stringify(spec);
    let compiled = this.#compiled.get(key);
    if (compiled === undefined) {
      compiled = compileGrammar(spec, this.#tokenizer);
      if (this.#compiled.size >= CACHED_GRAMMARS) this.#compiled.delete(this.#compiled.keys().next().value!);
      this.#compiled.set(key, compiled);
    }
    return compiled.start();
  }
}

/** Throws what `compileGrammar` would throw, without a tokenizer: for a server that refuses before it queues. */
export function checkGrammar(spec: GrammarSpec): void {
  machineOf(grammarNode(spec));
}

function machineOf(root: Node): Automaton {
  const machine = new Machine(root);
  if (machine.start === DEAD)
    throw new NibbleError("bad_option", "The grammar matches nothing: no answer could satisfy it.");
  return machine.hasDistinct ? new DistinctMachine(machine) : machine;
}

/** A grammar as a node. */
export function grammarNode(spec: GrammarSpec): Node {
  switch (spec.kind) {
    case "json_schema":
      return schemaToGrammar(spec.schema);
    case "json_object":
      return anyObject();
    case "regex":
      return parseRegex(spec.pattern, "whole");
    case "ebnf":
      return parseGrammar(spec.grammar);
    case "tool_calls":
      return toolCalls(spec.format, spec.tools, spec.many);
  }
}

class GrammarConstraint implements TokenConstraint {
  #state: number;
  /** Of the open array whose items have to differ. */
  #items: Items | undefined;
  readonly #machine: Automaton;
  readonly #masks: Map<number, Uint32Array>;
  readonly #vocabulary: Vocabulary;

  constructor(machine: Automaton, masks: Map<number, Uint32Array>, vocabulary: Vocabulary) {
    this.#machine = machine;
    this.#masks = masks;
    this.#vocabulary = vocabulary;
    this.#state = machine.start;
  }

  get done(): boolean {
    return this.#machine.accepts(this.#state);
  }

  /** Includes the end-of-sequence tokens where the text is whole. Read it before the next call. */
  allowed(): Uint32Array {
    let mask = this.#masks.get(this.#state);
    if (mask === undefined) {
      mask = this.#vocabulary.mask(this.#machine, this.#state);
      if (this.done) for (const id of this.#vocabulary.eosIds) mask[id >>> 5] |= 1 << (id & 31);
      if (this.#masks.size >= MASK_CACHE) this.#masks.delete(this.#masks.keys().next().value!);
      this.#masks.set(this.#state, mask);
    }
    return mask;
  }

  accept(id: number): void {
    if (this.done && this.#vocabulary.eosIds.includes(id)) return;
    let state = this.#vocabulary.isSpecial(id) ? DEAD : this.#state;
    const machine = this.#machine;
    let items = this.#items;
    for (const byte of this.#vocabulary.bytesOf(id)) {
      if (machine instanceof DistinctMachine) items = machine.follow(state, byte, items);
      state = machine.next(state, byte);
    }
    if (state === DEAD) throw new NibbleError("engine", `Token ${id} is not allowed by the grammar at this place.`);
    this.#state = machine instanceof DistinctMachine ? machine.settle(state, items) : state;
    this.#items = items;
  }
}
