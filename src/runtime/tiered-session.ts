/**
 * A decoder graph with the two-tier int4 cache (kv/int4.ts): one sequence at a time. A prompt goes through in pieces, so
 * that no more of it than a piece is ever held in float16.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import { type TierPart, TwoTierCache } from "../kv/int4-tiers.ts";
import type { Ort } from "../onnx/ort.ts";
import { type CacheAbilities, type GraphShape, logitRows, type Rows } from "./session.ts";

/** Tokens of a prompt at once: as float16, 128 are a quarter of 2,000 in 4 bits each, and given back after it. */
const PIECE = 128;

export class TieredSession {
  readonly shape: GraphShape;
  readonly can: CacheAbilities = { batch: false, cut: true, copy: false };
  readonly cache: TwoTierCache;
  private readonly parts: readonly (TierPart & { readonly name: string })[];
  private readonly inputs: ReadonlySet<string>;

  /** @param fixedScales of "int4-static", one array a part, in the order of the graph's inputs. */
  constructor(
    private readonly ort: Ort,
    private readonly session: InferenceSession,
    readonly name: string,
    fixedScales?: readonly Float32Array[],
  ) {
    this.inputs = new Set(session.inputNames);
    this.parts = session.inputMetadata.flatMap((input) => {
      if (!input.isTensor || !/^past_key_values\.\d+\.(key|value)$/.test(input.name)) return [];
      if (input.type !== "float16") {
        throw new NibbleError(
          "unsupported",
          `${name}: the tail of this int4 cache is ${input.type}, as an earlier Nibble made it; float16 is read. Make the folder again with --kv int4.`,
          { param: "kv" },
        );
      }
      const [, kvHeads, , headDim] = input.shape.map(Number);
      return [{ name: input.name.replace("past_key_values.", ""), kvHeads, headDim }];
    });
    this.parts = sortedParts(this.parts);
    this.cache = new TwoTierCache(this.parts, fixedScales);
    const logits = session.outputMetadata.find(({ name: output }) => output === "logits");
    const vocabSize = logits?.isTensor ? logits.shape[2] : undefined;
    this.shape = {
      cache: [],
      hasState: false,
      vocabSize: typeof vocabSize === "number" ? vocabSize : undefined,
      floatLogits: true,
      positionIds: false,
      numLogitsToKeep: this.inputs.has("num_logits_to_keep"),
      kvFormat: this.inputs.has("past_body_scales") ? "int4" : "int4-static",
      kvBytesPerToken: this.parts.reduce(
        (sum, { kvHeads, headDim }) => sum + kvHeads * (headDim / 2 + (this.inputs.has("past_body_scales") ? 1 : 0)),
        0,
      ),
    };
  }

  get kvBytesAllocated(): number {
    return this.cache.bytes;
  }

  bytesFor(_rows: number, tokens: number): number {
    return TwoTierCache.bytesFor(this.parts, tokens, this.shape.kvFormat === "int4-static");
  }

  reserve(): void {}

  moveRow(from: number, to: number): void {
    if (from !== to) throw new NibbleError("engine", `${this.name}: this cache holds one sequence at a time.`);
  }

  shrink(rows: number): void {
    if (rows === 0) this.cache.cut(0);
  }

  readTokens(): never {
    throw new NibbleError("unsupported", `${this.name}: what an int4 cache holds is not kept for later prompts.`);
  }

  writeTokens(): never {
    return this.readTokens();
  }

  decode([past]: readonly number[], tokens: readonly number[]): Promise<Float32Array[]> {
    return this.append(0, past, tokens, "last");
  }

  async append(_row: number, past: number, tokens: readonly number[], rows: Rows = "last"): Promise<Float32Array[]> {
    if (past > this.cache.length || !this.cache.cut(past)) {
      throw new NibbleError(
        "engine",
        `${this.name}: ${this.cache.length} tokens are in the cache, and ${past} were meant.`,
      );
    }
    const logits: Float32Array[] = [];
    for (let start = 0; start < tokens.length; start += PIECE) {
      const piece = tokens.slice(start, start + PIECE);
      const given = await this.step(piece, rows);
      if (rows === "all") logits.push(...given);
      else if (start + PIECE >= tokens.length) logits.push(given[given.length - 1]);
    }
    return logits;
  }

  private async step(tokens: readonly number[], rows: Rows): Promise<Float32Array[]> {
    const { Tensor } = this.ort;
    const { cache, parts } = this;
    cache.reserve(tokens.length);
    const total = cache.length + tokens.length;
    const feeds: Record<string, Tensor> = {
      input_ids: new Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
      past_body_length: new Tensor("int64", BigInt64Array.of(BigInt(cache.bodyLength)), [1]),
    };
    if (this.shape.numLogitsToKeep) {
      feeds.num_logits_to_keep = new Tensor("int64", BigInt64Array.of(rows === "last" ? 1n : 0n), []);
    }
    if (this.inputs.has("past_body_scales")) {
      const seen = Math.max(tokens.length, cache.bodyLength);
      const view = cache.scales.subarray(0, seen * cache.scaleWidth);
      feeds.past_body_scales = new Tensor("uint8", view, [seen, cache.scaleWidth]);
    }
    const fetches: Record<string, Tensor | null> = { logits: null };
    for (const [i, { name, kvHeads, headDim }] of parts.entries()) {
      const tail = new Tensor("float16", cache.tail[i], [1, kvHeads, cache.tailCapacity, headDim]);
      feeds[`past_key_values.${name}`] = tail;
      fetches[`present.${name}`] = tail;
      feeds[`past_body.${name}`] = new Tensor("uint8", cache.codes[i], [1, kvHeads, cache.bodyCapacity, headDim / 2]);
    }
    const { logits } = await this.session.run(feeds, fetches);
    cache.appended(tokens.length);
    return logitRows(logits);
  }

  async dispose(): Promise<void> {
    this.cache.tail = [];
    this.cache.codes = [];
    await this.session.release();
  }
}

/** By layer, keys before values: the order of the scales. */
function sortedParts<T extends { readonly name: string }>(parts: readonly T[]): T[] {
  const order = ({ name }: T) => 2 * Number.parseInt(name, 10) + Number(name.endsWith("value"));
  return [...parts].sort((a, b) => order(a) - order(b));
}
