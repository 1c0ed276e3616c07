/** Where the material lies that is too large for this repository; tests that need it skip aloud without it. */
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

/** A file of this repository. */
export function repoPath(...parts: string[]): string {
  return join(fileURLToPath(new URL("..", import.meta.url)), ...parts);
}

/** The folder with golden/, models/ and data/ (NIBBLE_SHARED), or undefined. */
export const shared: string | undefined = process.env.NIBBLE_SHARED;
/** The folder with smollm2/ and qwen/ as prepare.py made them (NIBBLE_MODELS), or undefined. */
export const models: string | undefined = process.env.NIBBLE_MODELS;

export function sharedPath(...parts: string[]): string {
  return join(shared ?? "NIBBLE_SHARED-is-not-set", ...parts);
}

export function modelPath(...parts: string[]): string {
  return join(models ?? "NIBBLE_MODELS-is-not-set", ...parts);
}

/** For test.skipIf: says on the console what the skipped tests need. */
export function isMissing(path: string): boolean {
  if (existsSync(path)) return false;
  console.warn(`skipped: ${path} is not there (set NIBBLE_SHARED and NIBBLE_MODELS, see README)`);
  return true;
}

/** Golden models by name, the repository's own and (with NIBBLE_SHARED) the shared ones: the folder of each. */
export function goldenModels(): ReadonlyMap<string, string> {
  const roots = [repoPath("test", "golden", "models"), sharedPath("golden", "models")].filter(
    (root) => !isMissing(root),
  );
  return new Map(
    roots
      .flatMap((root) => readdirSync(root).map((name) => [name, join(root, name)] as const))
      .filter(([, folder]) => existsSync(join(folder, "golden.json"))),
  );
}
