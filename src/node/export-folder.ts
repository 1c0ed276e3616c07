/** Export to a folder on disk that appears whole and checked, or not at all. */
import { resolveModel } from "../arch/index.ts";
import { floatWeights } from "../arch/weights.ts";
import type { Checkpoint } from "../checkpoint/checkpoint.ts";
import { type ExportInput, type ExportOptions, exportModel, writeManifest } from "../export/export.ts";
import type { Manifest } from "../export/model-folder.ts";
import type { FolderSource } from "../files.ts";
import { nodeSink } from "./folder-sink.ts";
import { rememberModel } from "./models.ts";

export interface ExportFolderOptions extends ExportOptions {
  /** Replace a model that is there already. */
  readonly overwrite?: boolean;
  /**
   * Looks at what was written before it gets its final name: throws `verification` to discard it, returns figures for
   * nibble.json's "measured".
   */
  readonly check?: (written: FolderSource, manifest: Manifest) => Promise<Readonly<Record<string, unknown>>>;
}

/** Exports a checkpoint as it is, or what a quantizer made of one. */
export async function exportFolder(
  source: Checkpoint | ExportInput,
  folder: string,
  options: ExportFolderOptions,
): Promise<Manifest> {
  const out = await nodeSink(folder, { overwrite: options.overwrite });
  try {
    let manifest = await exportModel("weights" in source ? source : asItIs(source), out, options);
    if (options.check) {
      manifest = { ...manifest, measured: await options.check(out.written, manifest) };
      await writeManifest(out, manifest);
    }
    options.signal?.throwIfAborted();
    await out.commit();
    await rememberModel(folder);
    return manifest;
  } catch (error) {
    await out.abort();
    throw error;
  }
}

function asItIs(checkpoint: Checkpoint): ExportInput {
  const model = resolveModel(checkpoint);
  return { model, weights: floatWeights(model.checkpoint) };
}
