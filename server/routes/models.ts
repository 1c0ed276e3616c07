/** GET /v1/models and /v1/models/{id} */
import { Hono } from "hono";
import type { ServerContext } from "../context.ts";
import type { ModelStatus } from "../models.ts";
import { ApiError } from "../openai/errors.ts";

export function toModel({ id, created }: ModelStatus) {
  return { id, object: "model", created, owned_by: "nibble" };
}

export function models({ registry }: ServerContext): Hono {
  return new Hono()
    .get("/v1/models", (c) => c.json({ object: "list", data: registry.list().map(toModel) }))
    .get("/v1/models/:id{.+}", (c) => {
      const id = c.req.param("id");
      const found = registry.find(id);
      if (!found) {
        const message = `The model '${id.slice(0, 128)}' does not exist; see /v1/models.`;
        throw new ApiError(404, "model_not_found", message, { param: "model", code: "not_found" });
      }
      return c.json(toModel(found));
    });
}
