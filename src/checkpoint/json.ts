/** JSON from outside: what JSON.parse does not say. */
import { NibbleError } from "../errors.ts";

/** Names that occur twice in the outermost object of valid JSON `text`; JSON.parse silently keeps the last. */
export function duplicateKeys(text: string): string[] {
  const seen = new Set<string>();
  const twice: string[] = [];
  let depth = 0;
  let expectKey = false;
  for (let at = 0; at < text.length; at++) {
    const char = text[at];
    if (char === "{" || char === "[") {
      depth++;
      expectKey = depth === 1;
    } else if (char === "}" || char === "]") depth--;
    else if (char === "," && depth === 1) expectKey = true;
    else if (char === '"') {
      const start = at++;
      for (; text[at] !== '"'; at++) if (text[at] === "\\") at++;
      if (!expectKey) continue;
      expectKey = false;
      const key = JSON.parse(text.slice(start, at + 1)) as string;
      if (seen.has(key)) twice.push(key);
      seen.add(key);
    }
  }
  return twice;
}

export type JsonObject = Readonly<Record<string, unknown>>;

export function isJsonObject(value: unknown): value is JsonObject {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** The object in a JSON file; `bad_file` names the file where it holds anything else. */
export function parseJsonObject(text: string, where: string): JsonObject {
  let value: unknown;
  try {
    value = JSON.parse(text);
  } catch (cause) {
    throw new NibbleError("bad_file", `${where} is no JSON: ${(cause as Error).message}.`, { cause });
  }
  if (isJsonObject(value)) return value;
  throw new NibbleError("bad_file", `${where} has to hold a JSON object.`);
}
