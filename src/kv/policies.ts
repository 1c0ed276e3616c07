/** `--kv-policy` and `--kv-budget`: which tokens a cache keeps, checked against the model, and said in words. */
import { NibbleError } from "../errors.ts";
import { BETWEEN, EVICTION_POLICIES, type EvictionPlan, evictionPlan, FIRST, NEWEST } from "./eviction.ts";
import { DEFAULT_BUDGET, SINK_TOKENS, type WindowPolicy, windowPolicy } from "./window.ts";

export interface KeptTokens {
  readonly window?: WindowPolicy;
  readonly eviction?: EvictionPlan;
}

/** Names for `--kv-policy`. */
export const KV_POLICIES: readonly string[] = ["full", "window", ...EVICTION_POLICIES.map(({ name }) => name)];

/** Errors: `unsupported` for a name that is none, `bad_option` for a budget that does not fit. */
export function keptTokensOf(
  policy: string,
  asked: number | undefined,
  context: number | undefined,
  contextLength: number,
): KeptTokens {
  const budget = asked ?? Math.min(DEFAULT_BUDGET, contextLength);
  if (policy === "window") return { window: windowPolicy(asked ?? context ?? budget, contextLength) };
  const evicting = EVICTION_POLICIES.find(({ name }) => name === policy);
  if (evicting) return { eviction: evictionPlan(evicting.name, budget, contextLength) };
  if (policy !== "full") {
    throw new NibbleError("unsupported", `--kv-policy ${policy}: this version has ${KV_POLICIES.join(", ")}.`, {
      param: "kvPolicy",
    });
  }
  if (asked === undefined) return {};
  throw new NibbleError("bad_option", "--kv-budget says what another --kv-policy keeps; full keeps everything.", {
    param: "kvBudget",
  });
}

/** Tokens that a row of the cache holds at most while generating; undefined where it holds all of the text. */
export function mostTokens({ window, eviction }: KeptTokens): number | undefined {
  return window?.budget ?? (eviction && eviction.budget + BETWEEN);
}

/** Errors `unsupported` for what a cache of this format cannot do besides. */
export function requireTogether(format: string, { eviction }: KeptTokens, device: string, maxBatch: number): void {
  const refuse = (message: string, param: string): never => {
    throw new NibbleError("unsupported", message, { param });
  };
  if (device === "webgpu") {
    if (format.startsWith("int")) {
      refuse(`--kv ${format}: WebGPU has float caches, and in a page int8 on the graph of a float one.`, "kv");
    }
    if (eviction) {
      refuse(
        `--kv-policy ${eviction.policy}: the WebGPU provider rotates by the cache's length, which is not the text's here.`,
        "kvPolicy",
      );
    }
  }
  if (!format.startsWith("int4")) return;
  if (maxBatch > 1) refuse(`--kv ${format} holds one sequence at a time; maxBatch has to be 1.`, "maxBatch");
  if (eviction)
    refuse(`--kv-policy ${eviction.policy} goes with float and int8 caches, not with ${format}.`, "kvPolicy");
}

/** For people and for `EngineInfo`: the policy's name, and what it keeps. */
export function policyOf(kept: KeptTokens): { readonly policy: string; readonly keeps?: string } {
  const { window, eviction } = kept;
  return { policy: window ? "window" : (eviction?.policy ?? "full"), keeps: describeKept(kept) };
}

/** What is kept, for people; undefined where that is everything. */
function describeKept({ window, eviction }: KeptTokens): string | undefined {
  if (window) {
    return `window: the cache keeps the first ${SINK_TOKENS} tokens and the newest, at most ${window.budget}; it forgets what lies between`;
  }
  if (!eviction) return undefined;
  const others = eviction.budget - FIRST - NEWEST;
  return `${eviction.policy}: each head keeps the first ${FIRST} tokens, the newest ${NEWEST} and the ${others} scored highest (and up to ${BETWEEN} more between two selections); it forgets the others`;
}
