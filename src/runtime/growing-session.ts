/**
 * A decoder graph of another exporter, whose attention is made of plain operators: past and new keys are concatenated,
 * so every step's caches are new tensors, one token longer. One sequence at a time; the tensors are fed back as they
 * come.
 */
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import { type Ort, typedArray } from "../onnx/ort.ts";
import type { ModelProto } from "../onnx/proto.ts";
import { type CacheAbilities, type GraphShape, graphShape, logitRows, type Rows } from "./session.ts";

/** Whether all caches go straight into operators that append at a row's own length (GroupQueryAttention). */
export function cachesInPlace({ graph }: ModelProto): boolean {
  const caches = graph.input.filter(({ name }) => /^past_key_values\.\d+\.(key|value)$/.test(name));
  return caches.every(({ name }) =>
    graph.node.every(({ opType, input }) => !input.includes(name) || opType === "GroupQueryAttention"),
  );
}

export class GrowingSession {
  readonly shape: GraphShape;
  readonly can: CacheAbilities = { batch: false, cut: false, copy: false };
  private caches: Record<string, Tensor> = {};
  /** Tokens that the caches hold. */
  private length = 0;

  constructor(
    private readonly ort: Ort,
    private readonly session: InferenceSession,
    readonly name: string,
  ) {
    this.shape = graphShape(name, session.inputMetadata, session.outputMetadata);
  }

  get kvBytesAllocated(): number {
    return this.length * this.shape.kvBytesPerToken;
  }

  bytesFor(rows: number, tokens: number): number {
    return rows * tokens * this.shape.kvBytesPerToken;
  }

  reserve(): void {}

  moveRow(): void {}

  shrink(rows: number): void {
    if (rows > 0) return;
    this.caches = {};
    this.length = 0;
  }

  readTokens(): never {
    throw new NibbleError(
      "unsupported",
      `${this.name}: caches that grow by concatenation are not kept for later prompts.`,
    );
  }

  writeTokens(): never {
    return this.readTokens();
  }

  decode([past]: readonly number[], tokens: readonly number[]): Promise<Float32Array[]> {
    return this.append(0, past, tokens, "last");
  }

  async append(_row: number, past: number, tokens: readonly number[], rows: Rows = "last"): Promise<Float32Array[]> {
    if (past === 0) this.shrink(0);
    if (past !== this.length) {
      throw new NibbleError("engine", `${this.name}: ${this.length} tokens are in the cache, and ${past} were meant.`);
    }
    const { Tensor } = this.ort;
    const total = past + tokens.length;
    const feeds: Record<string, Tensor> = {
      input_ids: new Tensor("int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]),
      attention_mask: new Tensor("int64", new BigInt64Array(total).fill(1n), [1, total]),
    };
    if (this.shape.positionIds) {
      const positions = BigInt64Array.from(tokens, (_, i) => BigInt(past + i));
      feeds.position_ids = new Tensor("int64", positions, [1, tokens.length]);
    }
    if (this.shape.numLogitsToKeep) {
      feeds.num_logits_to_keep = new Tensor("int64", BigInt64Array.of(rows === "last" ? 1n : 0n), []);
    }
    for (const { past: name, type, heads, headDim, fixed } of this.shape.cache) {
      const empty = fixed ? [1, heads, headDim] : [1, heads, 0, headDim];
      const size = empty.reduce((product, dim) => product * dim, 1);
      feeds[name] = this.caches[name] ?? new Tensor(type, typedArray(type, size), empty);
    }
    const results = await this.session.run(feeds, ["logits", ...this.shape.cache.map(({ present }) => present)]);
    for (const { past: name, present } of this.shape.cache) this.caches[name] = results[present];
    this.length = total;
    const all = logitRows(results.logits);
    return rows === "all" ? all : all.slice(-1);
  }

  async dispose(): Promise<void> {
    this.shrink(0);
    await this.session.release();
  }
}
