/** `nibble`: one file per command; this one only puts them together. */
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Command, CommanderError } from "commander";
import { NibbleError } from "../errors.ts";
import { packageFolder } from "../node/package.ts";
import { chat } from "./chat.ts";
import { evalCommand } from "./eval.ts";
import { exportCommand } from "./export.ts";
import { inspect } from "./inspect.ts";
import { list } from "./list.ts";
import { quantizeCommand } from "./quantize.ts";
import { rm } from "./rm.ts";
import { EXIT_USAGE, reportError } from "./run.ts";
import { serveCommand } from "./serve.ts";

const { version, description } = JSON.parse(readFileSync(join(packageFolder(), "package.json"), "utf8"));
const program = new Command("nibble")
  .description(`${description}.`)
  .version(version)
  .showHelpAfterError("(--help says more)");

for (const command of [quantizeCommand, exportCommand, inspect, chat, serveCommand, evalCommand, list, rm])
  program.addCommand(command.copyInheritedSettings(program));
for (const command of [program, ...program.commands]) command.exitOverride();

// a reader that has seen enough (`nibble chat ... | head`) is no error
process.stdout.on("error", (error: NodeJS.ErrnoException) => {
  if (error.code !== "EPIPE") throw error;
  process.exit(0);
});

try {
  await program.parseAsync();
} catch (error) {
  // commander has printed its own message; --help and --version arrive here too, with code 0
  const json = process.argv.includes("--json");
  if (!(error instanceof CommanderError)) process.exitCode = reportError({ json }, error);
  else if (error.exitCode === 0) process.exitCode = 0;
  else {
    process.exitCode = EXIT_USAGE;
    if (json) reportError({ json }, new NibbleError("bad_option", error.message.replace(/^error: /, "")));
  }
}
