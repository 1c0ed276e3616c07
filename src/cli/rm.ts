import { Command } from "commander";
import { formatBytes } from "../node/memory.ts";
import { removeModel } from "../node/models.ts";
import { withOutputFlags } from "./options.ts";
import type { OutputFlags } from "./output.ts";
import { runCommand } from "./run.ts";

export const rm = withOutputFlags(
  new Command("rm")
    .description("delete models from this machine")
    .argument("<model...>", "names or paths, as `nibble list` shows them"),
).action((names: readonly string[], flags: OutputFlags) =>
  runCommand(flags, async ({ output }) => {
    const removed = [];
    for (const name of names) removed.push(await removeModel(name));
    const lines = removed.map(({ name, sizeBytes, path }) => `removed ${name} (${formatBytes(sizeBytes)}, ${path})`);
    output.result(lines.join("\n"), removed);
  }),
);
