/** Runs one command: Ctrl-C aborts it cleanly, an error ends it with one message and an exit code. */
import { NibbleError } from "../errors.ts";
import { Output, type OutputFlags } from "./output.ts";

/** Exit codes: 0 done, 1 failed, 2 wrong use, 130 stopped by Ctrl-C (128 + SIGINT, as shells do). */
const EXIT_FAILED = 1;
export const EXIT_USAGE = 2;
const EXIT_INTERRUPTED = 130;

export interface CommandContext {
  readonly output: Output;
  /** Aborted by Ctrl-C; a second Ctrl-C ends the process at once. */
  readonly signal: AbortSignal;
  /** What Ctrl-C does from now on instead, where a command has its own use for it. */
  readonly onInterrupt: (handler: () => void) => void;
}

export async function runCommand(flags: OutputFlags, body: (context: CommandContext) => Promise<void>): Promise<void> {
  const output = new Output(flags);
  const controller = new AbortController();
  let interrupt = () => {
    if (controller.signal.aborted) process.exit(EXIT_INTERRUPTED);
    controller.abort(new NibbleError("aborted", "Stopped by Ctrl-C; nothing was left behind."));
  };
  const onSignal = () => interrupt();
  const onInterrupt = (handler: () => void) => {
    interrupt = handler;
  };
  process.on("SIGINT", onSignal);
  try {
    await body({ output, signal: controller.signal, onInterrupt });
  } catch (error) {
    output.clearBar();
    const code = reportError(flags, error);
    process.exitCode = controller.signal.aborted ? EXIT_INTERRUPTED : code;
  } finally {
    process.off("SIGINT", onSignal);
  }
}

/** One clear message for an error that was foreseen, the stack for one that was not; returns the exit code. */
export function reportError(flags: OutputFlags, error: unknown): number {
  const known = error instanceof NibbleError;
  const message = error instanceof Error ? error.message : String(error);
  if (flags.json) {
    const { code, param } = known ? error : { code: "internal", param: undefined };
    process.stdout.write(`${JSON.stringify({ error: { code, param, message } }, null, 2)}\n`);
  } else if (known) {
    process.stderr.write(`nibble: ${message}\n`);
  } else {
    const stack = error instanceof Error ? error.stack : String(error);
    process.stderr.write(`nibble: an error that Nibble did not foresee (please report it):\n${stack}\n`);
  }
  return known && error.code === "bad_option" ? EXIT_USAGE : EXIT_FAILED;
}
