/** Runs bin/nibble.js as a user's shell does. */
import { spawn } from "node:child_process";
import { repoPath } from "../helpers.ts";

export interface CommandResult {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface RunOptions {
  readonly cwd?: string;
  readonly input?: string;
  readonly env?: Readonly<Record<string, string>>;
  /** Sends SIGINT as soon as standard error shows this. */
  readonly interruptAt?: string;
}

export function nibble(args: readonly string[], options: RunOptions = {}): Promise<CommandResult> {
  const child = spawn(process.execPath, [repoPath("bin", "nibble.js"), ...args], {
    cwd: options.cwd,
    env: { ...process.env, ...options.env },
  });
  let stdout = "";
  let stderr = "";
  let interrupted = false;
  child.stdout.on("data", (bytes) => {
    stdout += bytes;
  });
  child.stderr.on("data", (bytes) => {
    stderr += bytes;
    if (options.interruptAt === undefined || interrupted || !stderr.includes(options.interruptAt)) return;
    interrupted = true;
    child.kill("SIGINT");
  });
  child.stdin.end(options.input ?? "");
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code) => resolve({ code, stdout, stderr }));
  });
}
