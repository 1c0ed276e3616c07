/**
 * Who may ask: Host (against DNS rebinding), Origin (against other pages of the user's browser) and API keys.
 * Pure: the platform's Web Crypto is all it needs.
 */
import type { MiddlewareHandler } from "hono";
import { ApiError } from "./openai/errors.ts";

export interface SecurityOptions {
  /** Host names beside localhost and IP addresses; "*" takes any. */
  readonly allowedHosts?: readonly string[];
  /** Origins of other pages that may call, "https://app.example"; "*" takes any. */
  readonly corsOrigins?: readonly string[];
  /** With none, no key is asked for. */
  readonly apiKeys?: readonly string[];
}

/** The name in a Host header, without port and brackets. */
export function hostName(host: string): string {
  const bracketed = /^\[([^\]]*)\]/.exec(host);
  return (bracketed ? bracketed[1] : host.replace(/:\d*$/, "")).toLowerCase();
}

/**
 * Rebinding needs a name that an attacker's DNS answers for, so addresses are always fine; names are fine when they are
 * this machine's own or were allowed.
 */
export function isAllowedHost(host: string, allowed: readonly string[]): boolean {
  const name = hostName(host);
  if (allowed.includes("*") || allowed.some((entry) => entry.toLowerCase() === name)) return true;
  if (name === "localhost" || name.endsWith(".localhost")) return true;
  return /^\d{1,3}(\.\d{1,3}){3}$/.test(name) || (name.includes(":") && /^[0-9a-f:.]+$/.test(name));
}

/** Same host and port as the request was sent to, whatever the scheme (a proxy may end TLS). */
function isSameOrigin(origin: string, host: string | undefined): boolean {
  return host !== undefined && URL.canParse(origin) && new URL(origin).host === host.toLowerCase();
}

const CORS_HEADERS = { "Access-Control-Expose-Headers": "x-request-id, retry-after", Vary: "Origin" };

/** Refuses unknown hosts and origins with 403; answers preflights of those it knows. */
export function originGuard(options: SecurityOptions): MiddlewareHandler {
  const hosts = options.allowedHosts ?? [];
  const origins = options.corsOrigins ?? [];
  return async (c, next) => {
    const host = c.req.header("host");
    if (host !== undefined && !isAllowedHost(host, hosts)) {
      throw new ApiError(403, "host_not_allowed", `The host ${hostName(host)} is not allowed; --allowed-host adds it.`);
    }
    const origin = c.req.header("origin");
    if (origin === undefined) return next();
    const listed = origins.includes("*") || origins.includes(origin);
    if (!listed && !isSameOrigin(origin, host ?? new URL(c.req.url).host)) {
      throw new ApiError(403, "origin_not_allowed", `The origin ${origin} is not allowed; --cors-origin adds it.`);
    }
    if (c.req.method === "OPTIONS") {
      return c.body(null, 204, {
        ...CORS_HEADERS,
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        // clients send headers of their own (x-stainless-*), so what is asked for is allowed
        "Access-Control-Allow-Headers": c.req.header("access-control-request-headers") ?? "authorization, content-type",
        "Access-Control-Max-Age": "600",
      });
    }
    await next();
    c.res.headers.set("Access-Control-Allow-Origin", origin);
    for (const [name, value] of Object.entries(CORS_HEADERS)) c.res.headers.append(name, value);
  };
}

/** Equal or not, in a time that does not tell where they differ: both sides are hashed to 32 bytes first. */
async function digest(text: string): Promise<Uint8Array> {
  return new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text)));
}

function equalBytes(a: Uint8Array, b: Uint8Array): boolean {
  let difference = a.length ^ b.length;
  for (let i = 0; i < a.length; i++) difference |= a[i] ^ b[i];
  return difference === 0;
}

/** Asks for one of the keys as OpenAI's, Anthropic's and Azure's clients send it. */
export function keyGuard(apiKeys: readonly string[], isPublic: (path: string) => boolean): MiddlewareHandler {
  const digests = Promise.all(apiKeys.map(digest));
  return async (c, next) => {
    if (apiKeys.length === 0 || c.req.method === "OPTIONS" || isPublic(c.req.path)) return next();
    const bearer = /^Bearer\s+(.+)$/i.exec(c.req.header("authorization") ?? "")?.[1];
    const key = bearer ?? c.req.header("x-api-key") ?? c.req.header("api-key");
    if (key === undefined) {
      throw new ApiError(401, null, "You didn't provide an API key: send it as Authorization: Bearer YOUR_KEY.");
    }
    const given = await digest(key.trim());
    let known = false;
    for (const expected of await digests) known = equalBytes(given, expected) || known; // every key is compared
    if (!known) throw new ApiError(401, "invalid_api_key", "Incorrect API key provided.");
    return next();
  };
}
