/**
 * What each execution provider runs as one operator. A model folder serves all of them with the same graphs, so a fusion
 * is used where every target has it, and plain operators stand in its place elsewhere.
 */

/** onnxruntime-node's CPU provider, onnxruntime-web's WASM builds, its WebGPU builds. */
export const TARGETS = ["cpu", "wasm", "webgpu"] as const;
export type Target = (typeof TARGETS)[number];

interface Fusion {
  readonly on: readonly Target[];
  /** Seen by running onnxruntime-node 1.30.0 and onnxruntime-web 1.30.0. */
  readonly evidence: string;
}

const FUSIONS = {
  /** Add and RMSNorm: SkipSimplifiedLayerNormalization. */
  residualNorm: { on: TARGETS, evidence: "equal to two operators on all three" },
  /** Rotary, window and cache inside GroupQueryAttention. */
  attention: {
    on: TARGETS,
    evidence: "the golden models pass on all three; a batch with a past takes one token a row",
  },
  /** cap * tanh(scores / cap) inside GroupQueryAttention. */
  scoreCap: {
    on: ["cpu", "wasm"],
    evidence: "the WebGPU kernel ignores it without an error: Gemma 2's logits are off by 2",
  },
  /** q_norm_weight and k_norm_weight of GroupQueryAttention. */
  headNormInAttention: { on: ["webgpu"], evidence: "refused on CPU: only the CUDA and WebGPU providers have it" },
  /** GatherBlockQuantized for the embedding. */
  quantizedGather: { on: ["cpu"], evidence: "no CPU kernel in onnxruntime-web's asyncify and jspi builds" },
  /** QMoE for the experts. */
  experts: {
    on: [],
    evidence:
      "right on the CPU, but 195 ms a token against 2.7 ms for MatMulNBits per expert (64 experts of 1024 x 512, 8 a token, one run)",
  },
} as const satisfies Record<string, Fusion>;

/** Whether a fused operator may stand in a graph that all of `targets` run. */
export function mayFuse(fusion: keyof typeof FUSIONS, targets: readonly Target[] = TARGETS): boolean {
  const on: readonly Target[] = FUSIONS[fusion].on;
  return targets.every((target) => on.includes(target));
}
