/** Whether prompts are read through products of integers (src/export/prompt-products.ts), which take memory of their own. */
import { NibbleError } from "../errors.ts";
import { formatBytes } from "./memory.ts";

/** "stored": with the codes of the file; "int8": pieces of prompts with int8 weights made of them. */
export const PROMPT_PRODUCTS = ["int8", "stored"] as const;
export type PromptProducts = (typeof PROMPT_PRODUCTS)[number];

/** Copies of all weights while a session opens on them: this process's, the library's, and the one that its kernels want. */
const COPIES = 3;

export interface PromptWish {
  readonly promptProducts?: PromptProducts;
  readonly device: "cpu" | "webgpu";
  /** Of int8 weights; 0: the graph has no products that integers can replace. */
  readonly int8Bytes: number;
  /** Of weights as stored. */
  readonly weightBytes: number;
  /** Memory that is left beside weights and cache. */
  readonly spareBytes: number;
}

export interface PromptChoice {
  readonly products: PromptProducts;
  readonly note?: string;
}

/** Errors: `unsupported` and `no_space` where int8 was asked for by name. */
export function choosePromptProducts(folder: string, wish: PromptWish): PromptChoice {
  const { promptProducts: asked, device, int8Bytes, weightBytes, spareBytes } = wish;
  if (asked === "stored" || (asked === undefined && (device !== "cpu" || int8Bytes === 0)))
    return { products: "stored" };
  const refuse = (code: "unsupported" | "no_space", why: string): never => {
    throw new NibbleError(code, `--prompt-products int8: ${why}`, { param: "promptProducts" });
  };
  if (device !== "cpu") return refuse("unsupported", "only CPUs multiply so; use --prompt-products stored.");
  if (int8Bytes === 0) {
    const why = `${folder} has no products with 4-bit weights, float32 activations and accuracy_level 4`;
    return refuse("unsupported", `${why}; use --prompt-products stored.`);
  }
  const needBytes = COPIES * (int8Bytes + weightBytes) - weightBytes;
  if (needBytes <= spareBytes) return { products: "int8" };
  const why = `int8 weights of ${formatBytes(int8Bytes)} take ${formatBytes(needBytes)} while they load, and ${formatBytes(spareBytes)} are left`;
  if (asked) return refuse("no_space", `${why}. --prompt-products stored, or a shorter --context, needs less.`);
  return { products: "stored", note: `prompts are read with weights as stored, two to three times slower: ${why}.` };
}
