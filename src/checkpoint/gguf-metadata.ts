/**
 * Reads the `<architecture>.*` keys of a GGUF so that none is overlooked: a key is asked for, known to be without
 * effect, or an error that names it (it may change what the model computes).
 */
import { NibbleError } from "../errors.ts";
import type { GgufValue } from "./gguf.ts";

/** Keys that repeat what the tensors say, or that say how a file was made. */
const WITHOUT_EFFECT = new Set([
  "vocab_size", // the embedding's rows
  "tensor_data_layout",
  "rope.scaling.finetuned",
  "attention.value_length", // the v matrix's rows
  "attention.group_norm_epsilon", // written as 0 by old converters
  "logits_all",
]);

/** What files with an image encoder inside say about it (Ollama's gemma3). */
const IMAGES = /^(vision|mm)\./;

export class GgufMetadata {
  readonly architecture: string;
  private readonly read = new Set<string>();

  constructor(
    private readonly all: ReadonlyMap<string, GgufValue>,
    readonly where: string,
  ) {
    const architecture = all.get("general.architecture");
    if (typeof architecture !== "string") {
      throw new NibbleError("bad_file", `${where}: its metadata has no general.architecture, so the model is unknown.`);
    }
    this.architecture = architecture;
  }

  value(key: string): GgufValue | undefined {
    this.read.add(key);
    return this.all.get(`${this.architecture}.${key}`);
  }

  error(key: string, found: string): NibbleError {
    const name = `${this.architecture}.${key}`;
    return new NibbleError("bad_config", `${this.where}: the metadata key ${name} ${found}.`, { param: name });
  }

  number(key: string, fallback?: number): number {
    const value = this.value(key) ?? fallback;
    if (typeof value === "number" && Number.isFinite(value)) return shortest(value);
    throw this.error(key, value === undefined ? "is missing" : `is ${show(value)}; it has to be a number`);
  }

  /** A whole number of at least 1. */
  int(key: string, fallback?: number): number {
    const value = this.number(key, fallback);
    if (Number.isSafeInteger(value) && value > 0) return value;
    throw this.error(key, `is ${value}; it has to be a whole number above 0`);
  }

  boolean(key: string, fallback: boolean): boolean {
    const value = this.value(key) ?? fallback;
    if (typeof value === "boolean") return value;
    throw this.error(key, `is ${show(value)}; it has to be a bool`);
  }

  string(key: string, fallback: string): string {
    const value = this.value(key) ?? fallback;
    if (typeof value === "string") return value;
    throw this.error(key, `is ${show(value)}; it has to be a string`);
  }

  /** One number per layer, where the file gives one for all or a list. */
  perLayer(key: string, layers: number, fallback?: number): readonly number[] {
    const value = this.value(key) ?? fallback;
    if (typeof value === "number") return Array.from({ length: layers }, () => value);
    if (Array.isArray(value) && value.length >= layers && value.every((item) => typeof item === "number")) {
      return value.slice(0, layers) as number[];
    }
    throw this.error(key, value === undefined ? "is missing" : `is ${show(value)}; ${layers} layers were expected`);
  }

  /** The same number in every layer; other models are refused. */
  everyLayer(key: string, layers: number, fallback?: number): number {
    const values = this.perLayer(key, layers, fallback);
    if (values.every((value) => value === values[0] && Number.isSafeInteger(value) && value > 0)) return values[0];
    throw this.error(key, `differs from layer to layer (${values.join(", ")}), which no family Nibble knows does`);
  }

  /** A token id of the tokenizer's metadata. */
  tokenId(name: "bos" | "eos" | "padding"): number | undefined {
    const id = this.all.get(`tokenizer.ggml.${name}_token_id`);
    return typeof id === "number" ? id : undefined;
  }

  /** The key may be there only with a value that leaves the computation as it is. */
  expect(key: string, ...allowed: GgufValue[]): void {
    const value = this.value(key);
    if (value === undefined || allowed.includes(value)) return;
    throw this.error(
      key,
      `is ${show(value)}; Nibble computes ${this.architecture} only with ${allowed.map(show).join(" or ")}`,
    );
  }

  ignore(...keys: readonly string[]): void {
    for (const key of keys) this.read.add(key);
  }

  /** Call last: what nobody asked for may change the computation. */
  finish(): void {
    const prefix = `${this.architecture}.`;
    for (const [name, value] of this.all) {
      const key = name.slice(prefix.length);
      if (!name.startsWith(prefix) || this.read.has(key) || WITHOUT_EFFECT.has(key) || IMAGES.test(key)) continue;
      throw this.error(key, `(${show(value)}) is not known to Nibble; it may change what the model computes`);
    }
  }
}

function show(value: GgufValue): string {
  const text = typeof value === "bigint" ? String(value) : JSON.stringify(value);
  return text.length > 60 ? `${text.slice(0, 60)}...` : text;
}

/** The shortest decimal that is the same float32: 9.999999747378752e-6 was written as 1e-5. */
function shortest(value: number): number {
  if (Math.fround(value) !== value) return value;
  for (let digits = 1; digits < 9; digits++) {
    const rounded = Number(value.toPrecision(digits));
    if (Math.fround(rounded) === value) return rounded;
  }
  return value;
}
