import { Command } from "commander";
import { formatBytes } from "../node/memory.ts";
import { listModels } from "../node/models.ts";
import { withOutputFlags } from "./options.ts";
import { type OutputFlags, table } from "./output.ts";
import { runCommand } from "./run.ts";

export const list = withOutputFlags(
  new Command("list").description("list models on this machine: made by nibble, and downloaded from the hub"),
).action((flags: OutputFlags) =>
  runCommand(flags, async ({ output }) => {
    const models = await listModels();
    const rows = models.map(({ kind, name, sizeBytes, modifiedAt, path }) => [
      name,
      kind,
      formatBytes(sizeBytes),
      modifiedAt.toISOString().slice(0, 10),
      path,
    ]);
    const text = models.length > 0 ? table(["name", "kind", "size", "changed", "path"], rows, [2]) : "No models yet.";
    output.result(text, models);
  }),
);
