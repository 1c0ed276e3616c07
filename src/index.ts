/** The library in Node: a checkpoint in, a folder out, an engine that answers. A page imports `nibble-llm/web` instead. */
export {
  awq,
  gptq,
  hqq,
  type MethodOptions,
  type Preset,
  preset,
  prune,
  type Recipe,
  rtn,
  smoothquant,
} from "../quant/recipes.ts";
export type { Checkpoint } from "./checkpoint/checkpoint.ts";
export { type ErrorCode, NibbleError } from "./errors.ts";
export type { Manifest, ModelDtype } from "./export/model-folder.ts";
export { type LoadEngineOptions, loadEngine } from "./node/engine.ts";
export { type ExportFolderOptions, exportFolder as exportModel } from "./node/export-folder.ts";
export { type FitTarget, type Fitted, quantizeToFit } from "./node/fit.ts";
export { type LocalModel, listModels, removeModel } from "./node/models.ts";
export { type OpenCheckpointOptions, openCheckpoint } from "./node/open-checkpoint.ts";
export { type Quantized, type QuantizeOptions, quantize } from "./node/quantize.ts";
export type { NamedText } from "./node/text-windows.ts";
export type { OnProgress, Progress } from "./progress.ts";
export type { Engine, EngineInfo, GenerateOptions, Piece, SamplingOptions, Usage } from "./runtime/engine.ts";
export type { ChatMessage, Tokenizer } from "./tokenizer/tokenizer.ts";
export { version } from "./version.ts";
