/** Nibble's own folder for what can be made again: probe results, resumable work, the list of made models. */
import { homedir } from "node:os";
import { join } from "node:path";

/** `$NIBBLE_CACHE`, else the platform's cache folder (`XDG_CACHE_HOME`, `~/Library/Caches`, `LOCALAPPDATA`) + "nibble". */
export function cacheFolder(
  env: NodeJS.ProcessEnv = process.env,
  platform: NodeJS.Platform = process.platform,
): string {
  if (env.NIBBLE_CACHE) return env.NIBBLE_CACHE;
  const home = homedir();
  if (platform === "win32") return join(env.LOCALAPPDATA ?? join(home, "AppData", "Local"), "nibble", "cache");
  if (platform === "darwin") return join(home, "Library", "Caches", "nibble");
  return join(env.XDG_CACHE_HOME || join(home, ".cache"), "nibble");
}
