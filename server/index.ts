/** `nibble-llm/server`: the HTTP API as a Hono app, for any runtime that has `fetch`. */
export { type AppOptions, createApp } from "./app.ts";
export type { Metrics, RequestLog } from "./context.ts";
export { formatLog, formatLogJson } from "./log.ts";
export { ModelRegistry, type ModelSource, type ModelStatus, type RegistryOptions } from "./models.ts";
export { fields } from "./openai/fields.ts";
export type { PageFile, PageFiles } from "./page.ts";
