/** The OpenAPI document against the routes that the app has. */
import { expect, test } from "vitest";
import { acceptFields, type Endpoint, fields } from "../../server/openai/fields.ts";
import { makeDocument } from "../../server/routes/openapi.ts";
import { testApp } from "./serving.ts";

const { paths, components } = makeDocument();

test("every registered route is in the document, and nothing else is", () => {
  const { app } = testApp();
  const registered = app.routes
    .filter(({ method, path }) => method !== "ALL" && path !== "/*") // middleware
    .map(({ method, path }) => `${method} ${path.replace(/:(\w+)(\{[^}]*\})?/g, "{$1}")}`);
  const documented = Object.entries(paths).flatMap(([path, methods]) =>
    Object.keys(methods).map((method) => `${method.toUpperCase()} ${path}`),
  );
  expect(documented.sort()).toEqual([...new Set(registered)].sort());
});

test("it is served, and every reference in it is to a part of it", async () => {
  const document = await (await testApp().app.request("/openapi.json")).json();
  expect(document.paths).toEqual(JSON.parse(JSON.stringify(paths)));
  const references = JSON.stringify(document).matchAll(/"\$ref":"([^"]*)"/g);
  const known = Object.keys(components.schemas).map((name) => `#/components/schemas/${name}`);
  expect([...new Set(Array.from(references, ([, reference]) => reference))].sort()).toEqual(known.sort());
});

test("a request's properties are the table's: what is refused takes only what means off", () => {
  for (const [endpoint, list] of Object.entries(fields)) {
    const { post } = paths[endpoint] as { post: { requestBody: { content: Record<string, { schema: Properties }> } } };
    const { properties, additionalProperties } = post.requestBody.content["application/json"].schema;
    expect([Object.keys(properties), additionalProperties]).toEqual([list.map(({ name }) => name), false]);
    for (const { name, status } of list.filter((field) => field.status === "refused")) {
      for (const value of properties[name].enum ?? []) acceptFields(endpoint as Endpoint, { [name]: value });
      expect(() => acceptFields(endpoint as Endpoint, { [name]: { any: status } })).toThrow(name);
    }
  }
});

interface Properties {
  readonly properties: Readonly<Record<string, { readonly enum?: readonly unknown[] }>>;
  readonly additionalProperties: boolean;
}
