/** Opens a stored model folder with onnxruntime-web. */
import { NibbleError } from "../errors.ts";
import type { FolderSource } from "../files.ts";
import type { Engine } from "../runtime/engine.ts";
import type { BuildChoice } from "./device.ts";
import type { BlobFolder } from "./opfs.ts";
import type { OrtModule } from "./ort.ts";

export interface WebEngineOptions {
  readonly id: string;
  readonly graph: string;
  readonly choice: BuildChoice;
  readonly context?: number;
  readonly defaultContext: number;
}

export async function openWebEngine(
  _ort: OrtModule,
  _folder: FolderSource & BlobFolder,
  _options: WebEngineOptions,
): Promise<Engine> {
  throw new NibbleError("unsupported", "The runtime has not landed yet.");
}
