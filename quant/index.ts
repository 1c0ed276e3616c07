/** The quantizers by themselves: page-safe, ONNX Runtime handed in. In Node, `quantize` of `nibble-llm` wraps them. */
export { tokenWindows } from "./calibrate.ts";
export { gptqMatrix } from "./gptq.ts";
export { hqqMatrix } from "./hqq.ts";
export { type Plan, type WeightFormat, withPlan } from "./plan.ts";
export { ortProducts } from "./products.ts";
export { PRUNERS, type Pruning } from "./prune.ts";
export { type QuantizeTools, quantizeModel } from "./quantize.ts";
export { QuantizedModel } from "./quantized-model.ts";
export {
  awq,
  gptq,
  hqq,
  METHODS,
  type Method,
  type MethodOptions,
  method,
  PRESETS,
  type Preset,
  preset,
  prune,
  type Recipe,
  rtn,
  smoothquant,
} from "./recipes.ts";
export type { LayerStore } from "./record.ts";
export { rotateModel } from "./rotate.ts";
export { rtnMatrix } from "./rtn.ts";
export { sparseGptMatrix } from "./sparsegpt.ts";
export { parseSparsity, type Sparsity } from "./sparsity.ts";
export { type TuneReport, type Tuning, tune } from "./tune.ts";
export { type GridSpec, type InputStatistics, type Matrix, roundScaleToF16, roundScaleToF32 } from "./types.ts";
export { wandaMatrix } from "./wanda.ts";
