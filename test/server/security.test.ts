/** Who may ask, and what a request may weigh. */
import { expect, test } from "vitest";
import { isAllowedHost } from "../../server/security.ts";
import { testApp } from "./serving.ts";

const get = (headers: Record<string, string>, options: Parameters<typeof testApp>[1] = {}, path = "/v1/models") =>
  testApp({}, options).app.request(`http://localhost:8080${path}`, { headers });

test("addresses and localhost are fine, names only when allowed", () => {
  const fine = ["127.0.0.1:8080", "localhost", "localhost:1", "[::1]:8080", "192.168.1.20", "app.localhost:3000"];
  const wrong = ["evil.example", "localhost.evil.example:80", "127.0.0.1.evil.example", "", "1.2.3.4x"];
  expect(fine.filter((host) => !isAllowedHost(host, []))).toEqual([]);
  expect(wrong.filter((host) => isAllowedHost(host, []))).toEqual([]);
  expect(isAllowedHost("Box.lan:8080", ["box.lan"])).toBe(true);
  expect(isAllowedHost("any.example", ["*"])).toBe(true);
});

test("a rebound name is refused with 403", async () => {
  expect((await get({ host: "evil.example:8080" })).status).toBe(403);
  expect((await get({ host: "evil.example:8080" }, { allowedHosts: ["evil.example"] })).status).toBe(200);
});

test("a page of another origin is refused, its own and allowed ones are not", async () => {
  const host = "localhost:8080";
  expect((await get({ host, origin: "https://evil.example" })).status).toBe(403);
  expect((await get({ host, origin: "null" })).status).toBe(403);
  expect((await get({ host, origin: "http://localhost:8080" })).status).toBe(200);
  const allowed = await get({ host, origin: "https://app.example" }, { corsOrigins: ["https://app.example"] });
  expect(allowed.status).toBe(200);
  expect(allowed.headers.get("access-control-allow-origin")).toBe("https://app.example");
});

test("a preflight is answered without a key, the request behind it is not", async () => {
  const { app } = testApp({}, { corsOrigins: ["https://app.example"], apiKeys: ["k"] });
  const headers = {
    host: "localhost",
    origin: "https://app.example",
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,x-stainless-os",
  };
  const preflight = await app.request("/v1/chat/completions", { method: "OPTIONS", headers });
  expect(preflight.status).toBe(204);
  expect(preflight.headers.get("access-control-allow-headers")).toContain("x-stainless-os");
  expect(
    (await app.request("/v1/models", { headers: { host: "localhost", origin: "https://app.example" } })).status,
  ).toBe(401);
});

test("keys in each of the three headers, and nothing without one but /health", async () => {
  const options = { apiKeys: ["first", "second"] };
  expect((await get({}, options)).status).toBe(401);
  expect((await get({}, options)).headers.get("www-authenticate")).toBe("Bearer");
  expect((await get({ authorization: "Bearer wrong" }, options)).status).toBe(401);
  expect((await get({ authorization: "Bearer secon" }, options)).status).toBe(401);
  const keys: Record<string, string>[] = [
    { authorization: "Bearer second" },
    { "x-api-key": "first" },
    { "api-key": "first" },
  ];
  for (const headers of keys) {
    expect((await get(headers, options)).status).toBe(200);
  }
  for (const path of ["/v1/models", "/api/tags", "/metrics", "/props", "/slots", "/openapi.json"]) {
    expect([path, (await get({}, options, path)).status]).toEqual([path, 401]);
  }
  expect((await get({}, options, "/health")).status).toBe(200);
});

test("a body over the limit is 413, declared or not", async () => {
  const { app, post } = testApp({}, { limits: { maxBodyBytes: 1000 } });
  const big = JSON.stringify({ messages: [{ role: "user", content: "x".repeat(2000) }] });
  expect((await post("/v1/chat/completions", big)).status).toBe(413);
  const stream = new Blob([big]).stream();
  const undeclared = new Request("http://localhost/v1/chat/completions", {
    method: "POST",
    body: stream,
    duplex: "half",
  } as RequestInit);
  expect((await app.request(undeclared)).status).toBe(413);
});

test("errors speak the API that was asked", async () => {
  const { post, app } = testApp();
  expect(await (await post("/v1/messages", {})).json()).toMatchObject({
    type: "error",
    error: { type: "invalid_request_error" },
  });
  expect(await (await post("/api/chat", { model: "none", messages: [{ role: "user", content: "x" }] })).json()).toEqual(
    {
      error: expect.stringContaining("does not exist"),
    },
  );
  const unknown = await app.request("/v1/nothing");
  expect(unknown.status).toBe(404);
  expect((await unknown.json()).error.code).toBe("unknown_url");
});

test("the page comes with a policy that forbids eval and inline scripts, and stays inside its folder", async () => {
  const files = new Map([
    ["index.html", "<p>"],
    ["assets/a.js", "1"],
  ]);
  const asked: string[] = [];
  const page = async (path: string) => {
    asked.push(path);
    const text = files.get(path);
    if (text === undefined) return undefined;
    return { body: new TextEncoder().encode(text), sizeBytes: text.length, contentType: "text/html" };
  };
  const { app } = testApp({}, { page, apiKeys: ["k"] });
  const index = await app.request("/");
  expect(index.status).toBe(200);
  const policy = index.headers.get("content-security-policy") ?? "";
  expect(policy).toContain("script-src 'self' 'wasm-unsafe-eval'");
  expect(policy).not.toMatch(/'unsafe-eval'|script-src[^;]*'unsafe-inline'/);
  expect(index.headers.get("cross-origin-embedder-policy")).toBe("require-corp");
  expect((await app.request("/assets/a.js")).status).toBe(200);
  expect((await app.request("/missing.js")).status).toBe(404);
  expect((await app.request("/%E0%A4%A")).status).toBeLessThan(500);
});
