/** GET /health: 503 while the first model loads or the server ends, as load balancers want it. */
import { Hono } from "hono";
import { z } from "zod";
import type { ServerContext } from "../context.ts";

export const healthAnswer = z.object({
  status: z.enum(["ok", "loading model", "ending", "no model could be loaded"]),
  error: z.object({ code: z.int(), message: z.string(), type: z.string() }).optional(), // llama.cpp's clients look here
});

export function health({ registry, draining }: ServerContext): Hono {
  return new Hono().on("GET", ["/health", "/v1/health"], (c) => {
    const states = registry.list().map(({ state }) => state);
    if (draining()) return c.json({ status: "ending" }, 503);
    if (states.includes("ready")) return c.json({ status: "ok" });
    if (states.includes("loading")) {
      const error = { code: 503, message: "Loading model", type: "unavailable_error" };
      return c.json({ status: "loading model", error }, 503);
    }
    if (states.every((state) => state === "failed")) return c.json({ status: "no model could be loaded" }, 503);
    return c.json({ status: "ok" }); // the first request loads its model
  });
}
