/** `--fit` and `--max-kl` in Node: a plan for a budget of bytes or of drift. */
import { type FittedPlan, PlanFitter, type PlannedSize, sizeBySite } from "../../quant/fit.ts";
import { type Plan, plannedWeights, withPlan } from "../../quant/plan.ts";
import { ortProducts } from "../../quant/products.ts";
import type { Recipe } from "../../quant/recipes.ts";
import { type Model, resolveModel } from "../arch/index.ts";
import { floatWeights } from "../arch/weights.ts";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { NibbleError } from "../errors.ts";
import { measureDrift } from "../eval/drift.ts";
import { mainGraph } from "../export/export.ts";
import type { ModelDtype } from "../export/model-folder.ts";
import { writtenSize } from "../onnx/external-data.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import { cpuOrt } from "./cpu-ort.ts";
import { returnFreedMemory } from "./freed-memory.ts";
import { type Quantized, type QuantizeOptions, quantize } from "./quantize.ts";
import { shippedText, textWindows } from "./text-windows.ts";

export interface FitOptions extends QuantizeOptions {
  readonly dtype?: ModelDtype;
  readonly contextLength?: number;
  /** Told each plan before it is carried out. */
  readonly onPlan?: (fitted: FittedPlan, recipe: Recipe) => void;
  /** Told where a plan was given up for one setting. */
  readonly onNote?: (note: string) => void;
}

/** Bytes of the files that it takes to run (graph and weights), or nats of KL on held-back text. */
export type FitTarget = { readonly bytes: number } | { readonly maxKl: number };

export interface Fitted extends Quantized {
  readonly fitted: FittedPlan;
}

/** Expectations are sums over sites measured one by one: a plan that drifts more is made again with what was learned. */
const ATTEMPTS = 3;
/** Calibration that sensitivities take, where the recipe itself needs none. */
const LEAST_WINDOWS = 8;
/** A plan for a drift aims this far below it, since what is measured on two texts differs by as much. */
const AIM = 0.95;

/**
 * Computes the plan that loses least within the target and quantizes by it. Errors: `bad_option` where the target cannot
 * be met, `verification` where the drift that was measured stays above `maxKl`.
 */
export async function quantizeToFit(
  checkpoint: Checkpoint,
  recipe: Recipe,
  target: FitTarget,
  options: FitOptions = {},
): Promise<Fitted> {
  const model = resolveModel(checkpoint);
  const fitter = await measureFitter(checkpoint, model, recipe, options);
  const making: Making = { checkpoint, model, recipe, options };
  return "bytes" in target ? fitBytes(making, fitter, target.bytes) : fitDrift(making, fitter, target.maxKl);
}

interface Making {
  readonly checkpoint: Checkpoint;
  readonly model: Model;
  readonly recipe: Recipe;
  readonly options: FitOptions;
}

/**
 * Errors add up while they are small. Where the plan drifts more than the best single setting of no more bytes is expected
 * to, that one is made too, and the better of the two is kept.
 */
async function fitBytes(making: Making, fitter: PlanFitter, bytes: number): Promise<Fitted> {
  const fitted = fitter.within(bytes);
  const planned = await carryOut(making, fitted);
  const single = fitter.single(bytes);
  if (!single) return planned;
  const drift = await driftOf(making, planned);
  if (drift <= single.expectedKl) return planned;
  const plain = await carryOut(making, single);
  const plainDrift = await driftOf(making, plain);
  const [kept, left] = plainDrift < drift ? [plain, planned] : [planned, plain];
  await left.dispose();
  making.options.onNote?.(
    `the plan drifts by ${drift.toPrecision(3)} (${fitted.expectedKl.toPrecision(2)} expected), the best single setting by ${plainDrift.toPrecision(3)}: ${kept === plain ? "the single setting" : "the plan"} is kept`,
  );
  return kept;
}

async function fitDrift(making: Making, fitter: PlanFitter, maxKl: number): Promise<Fitted> {
  let factor = 1;
  for (let attempt = 1; ; attempt++) {
    const fitted = fitter.forKl((AIM * maxKl) / factor);
    const planned = await carryOut(making, fitted);
    const drift = await driftOf(making, planned);
    if (drift <= maxKl) return planned;
    await planned.dispose();
    if (attempt === ATTEMPTS) {
      throw new NibbleError(
        "verification",
        `${making.checkpoint.name}: a KL of ${maxKl} was not reached; the last of ${ATTEMPTS} plans came to ${drift.toPrecision(3)}, with ${(fitted.sizeBytes / 1e6).toFixed(1)} MB. Ask for more, or for bytes with --fit.`,
        { param: "max-kl" },
      );
    }
    factor = drift / fitted.expectedKl;
  }
}

/** Mean KL to the float model on text that quantization has not seen. */
async function driftOf({ model, options }: Making, { quantized, heldBack }: Quantized): Promise<number> {
  const { threads, signal, onProgress } = options;
  const float = floatWeights(model.checkpoint);
  const { dequantized } = quantized;
  return (await measureDrift(cpuOrt(threads), model, float, dequantized, heldBack, { signal, onProgress })).kl.mean;
}

async function carryOut({ checkpoint, recipe, options }: Making, fitted: FittedPlan): Promise<Fitted> {
  const planned = withPlan(checkpoint, recipe, fitted.plan);
  options.onPlan?.(fitted, planned);
  return { ...(await quantize(checkpoint, planned, options)), fitted };
}

async function measureFitter(
  checkpoint: Checkpoint,
  model: Model,
  recipe: Recipe,
  { text, threads, dtype = "q4", contextLength, signal, onProgress }: FitOptions,
): Promise<PlanFitter> {
  const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
  const named = text ?? (await shippedText(tokenizer));
  const { calibration } = textWindows(checkpoint, tokenizer, named, Math.max(recipe.windows, LEAST_WINDOWS));
  await returnFreedMemory();
  const ort = cpuOrt(threads);
  const products = ortProducts(ort);
  const sizeOf = (plan: Plan): PlannedSize => {
    const graph = mainGraph({ model, weights: plannedWeights(model, plan) }, { dtype, contextLength });
    const { graphBytes, dataBytes } = writtenSize(graph);
    return {
      sizeBytes: graphBytes + dataBytes,
      perSite: sizeBySite(model, graph.initializers.values(), graphBytes),
    };
  };
  try {
    return await PlanFitter.measure(model, recipe, calibration, sizeOf, { ort, products, signal, onProgress });
  } finally {
    await products.dispose();
  }
}
