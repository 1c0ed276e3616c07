/** Counts and times of the server for Prometheus. */
import { Counter, collectDefaultMetrics, Gauge, Histogram, Registry } from "prom-client";
import type { Metrics } from "../context.ts";
import type { ModelRegistry } from "../models.ts";

export function prometheusMetrics(models: ModelRegistry): Metrics {
  const registry = new Registry();
  const registers = [registry];
  collectDefaultMetrics({ register: registry });
  const requests = new Counter({
    name: "nibble_http_requests_total",
    help: "HTTP requests by route and status",
    labelNames: ["route", "status"],
    registers,
  });
  const duration = new Histogram({
    name: "nibble_http_request_seconds",
    help: "From a request to the end of its answer",
    labelNames: ["route"],
    buckets: [0.005, 0.02, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300],
    registers,
  });
  const firstToken = new Histogram({
    name: "nibble_time_to_first_token_seconds",
    help: "From the prompt to the first token",
    labelNames: ["model"],
    buckets: [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30],
    registers,
  });
  const tokens = new Counter({
    name: "nibble_tokens_total",
    help: "Tokens by model: of prompts, of prompts found in the cache, generated",
    labelNames: ["model", "kind"],
    registers,
  });
  new Gauge({
    name: "nibble_requests_active",
    help: "Generations running and waiting",
    labelNames: ["model", "state"],
    registers,
    collect() {
      this.reset();
      for (const { id, engine } of models.list()) {
        const stats = engine?.stats();
        this.set({ model: id, state: "running" }, stats?.running ?? 0);
        this.set({ model: id, state: "waiting" }, stats?.waiting ?? 0);
      }
    },
  });
  new Gauge({
    name: "nibble_model_bytes",
    help: "Weights and KV cache of loaded models",
    labelNames: ["model"],
    registers,
    collect() {
      this.reset();
      for (const { id, engine, sizeBytes } of models.list()) this.set({ model: id }, engine ? sizeBytes : 0);
    },
  });
  return {
    request({ path, status, durationMs, model, promptTokens, cachedTokens, completionTokens, timeToFirstTokenMs }) {
      const route = routeLabel(path);
      requests.inc({ route, status });
      duration.observe({ route }, durationMs / 1000);
      if (model === undefined) return;
      tokens.inc({ model, kind: "prompt" }, promptTokens ?? 0);
      tokens.inc({ model, kind: "cached" }, cachedTokens ?? 0);
      tokens.inc({ model, kind: "generated" }, completionTokens ?? 0);
      if (timeToFirstTokenMs !== undefined) firstToken.observe({ model }, timeToFirstTokenMs / 1000);
    },
    async text() {
      return { contentType: registry.contentType, body: await registry.metrics() };
    },
  };
}

/** Known routes by name, anything else as one, so that a scanner cannot fill the memory with labels. */
function routeLabel(path: string): string {
  if (/^\/v1\/models\/.+/.test(path)) return "/v1/models/{id}";
  const known = /^\/(v1\/[a-z_/]+|api\/[a-z]+|infill|tokenize|detokenize|apply-template|health|metrics|props|slots)$/;
  return known.test(path) && path.length < 40 ? path : "other";
}
