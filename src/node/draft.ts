/** The folder of `--draft`: whether its model can guess for another one, and what the worker has to know of it. */
import { stat } from "node:fs/promises";
import { basename, resolve } from "node:path";
import { capabilitiesOf, requireFeature } from "../arch/capabilities.ts";
import { NibbleError } from "../errors.ts";
import { describeGraph } from "../export/describe-graph.ts";
import { requireSameTokens } from "../runtime/draft.ts";
import { graphForKv, readOffer } from "../runtime/folder.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { nodeFolder } from "./files.ts";

export interface DraftSetup {
  readonly folder: string;
  readonly graph: string;
  readonly contextLength: number;
}

export interface DraftNeed extends DraftSetup {
  readonly weightBytes: number;
  readonly kvBytesPerToken: number;
}

/**
 * Reads a draft model's folder for the model `id`, whose texts hold `contextLength` tokens at most; errors: `not_found`,
 * and `unsupported` where its tokens are others or its cache cannot be cut back.
 */
export async function readDraft(
  folder: string,
  id: string,
  tokenizer: Tokenizer,
  contextLength: number,
): Promise<DraftNeed> {
  const path = resolve(folder);
  const info = await stat(path).catch(() => undefined);
  if (!info?.isDirectory()) {
    throw new NibbleError("not_found", `--draft ${folder} is no model folder.`, { param: "draft" });
  }
  const source = nodeFolder(path);
  const offer = await readOffer(source);
  const ownContext = Math.min(contextLength, offer.contextLength);
  requireFeature(capabilitiesOf(offer.config, ownContext), "speculation", "draft");
  requireSameTokens(id, tokenizer, basename(path), loadTokenizer(offer.files, { config: offer.config }));
  const graph = graphForKv(offer, undefined, "");
  const { weightBytes, kvBytesPerToken } = await describeGraph(source, graph);
  return { folder: path, graph, contextLength: ownContext, weightBytes, kvBytesPerToken };
}
