/** An app over scripted engines. */
import type { Hono } from "hono";
import { type AppOptions, createApp } from "../../server/app.ts";
import { ModelRegistry, type RegistryOptions } from "../../server/models.ts";
import type { Engine } from "../../src/runtime/engine.ts";
import { type ScriptedEngine, type ScriptOptions, scriptedEngine } from "../fixtures/scripted-engine.ts";

export interface TestApp {
  readonly app: Hono;
  readonly engine: ScriptedEngine;
  readonly registry: ModelRegistry;
  post(path: string, body: unknown, headers?: Record<string, string>): Promise<Response>;
}

export function sourceOf(engine: Engine, id = engine.info.id) {
  return { id, created: 1_700_000_000, sizeBytes: 1000, load: async () => engine };
}

export function testApp(
  script: ScriptOptions = {},
  options: Partial<AppOptions> & { readonly registry?: RegistryOptions } = {},
): TestApp {
  const engine = scriptedEngine(script);
  const registry = new ModelRegistry([sourceOf(engine)], options.registry);
  const app = createApp({ ...options, models: registry });
  const post = async (path: string, body: unknown, headers: Record<string, string> = {}): Promise<Response> =>
    app.request(path, {
      method: "POST",
      body: typeof body === "string" ? body : JSON.stringify(body),
      headers: { "content-type": "application/json", ...headers },
    });
  return { app, engine, registry, post };
}

/** The data of an event stream, parsed but for [DONE]. */
export async function events(response: Response): Promise<unknown[]> {
  const text = await response.text();
  return text
    .split("\n\n")
    .flatMap((block) => block.split("\n").filter((line) => line.startsWith("data: ")))
    .map((line) => (line === "data: [DONE]" ? "[DONE]" : JSON.parse(line.slice(6))));
}
