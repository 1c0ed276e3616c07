/** One name to a checkpoint: a folder or a file on disk, or a model of the Hugging Face hub. */
import { stat } from "node:fs/promises";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { openHfFolder } from "../checkpoint/hf-folder.ts";
import { NibbleError } from "../errors.ts";
import type { OnProgress } from "../progress.ts";
import { nodeFolder } from "./files.ts";

export interface OpenCheckpointOptions {
  /** A LoRA adapter in PEFT's format, merged as the weights are read: a folder or a hub id. */
  readonly adapter?: string;
  /** Branch, tag or commit of a hub id; `org/name@revision` says the same. */
  readonly revision?: string;
  /** For gated and private models; default: HF_TOKEN, or what `hf auth login` stored. */
  readonly token?: string;
  readonly onProgress?: OnProgress;
  readonly signal?: AbortSignal;
}

/** Opens a Hugging Face folder, .safetensors, .gguf, llama2.c .bin or a hub id (`org/name[@revision]`). */
export async function openCheckpoint(spec: string, _options: OpenCheckpointOptions = {}): Promise<Checkpoint> {
  const info = await stat(spec).catch(() => undefined);
  if (info?.isDirectory()) return openHfFolder(nodeFolder(spec));
  throw new NibbleError("not_found", `${spec} is no folder.`);
}
