/** Requests to the Hugging Face hub, or a mirror of it: token, retries, and its errors in Nibble's codes. */
import { readFile } from "node:fs/promises";
import { homedir } from "node:os";
import { join } from "node:path";
import { HUB_URL } from "@huggingface/hub";
import { NibbleError } from "../errors.ts";

/** Tries of one request before it fails, the first included. */
const TRIES = 5;
const FIRST_WAIT_MS = 500;
/** Longest pause that a server may ask for (Retry-After). */
const LONGEST_WAIT_MS = 60_000;

export interface HubConnection {
  readonly endpoint: string;
  /** fetch with the token; a status other than 2xx is a NibbleError. */
  fetch(url: string | URL | Request, init?: RequestInit): Promise<Response>;
}

/** `HF_ENDPOINT`, else the hub itself; without the slash at the end. */
export function hubEndpoint(env: NodeJS.ProcessEnv = process.env): string {
  return (env.HF_ENDPOINT || HUB_URL).replace(/\/+$/, "");
}

/** Nothing may be asked of the network. */
export function isOffline(env: NodeJS.ProcessEnv = process.env): boolean {
  return [env.HF_HUB_OFFLINE, env.TRANSFORMERS_OFFLINE].some((flag) => /^(1|true|yes|on)$/i.test(flag ?? ""));
}

/** The token given, `HF_TOKEN`, or the one that `hf auth login` stored. */
export async function hubToken(given?: string, env: NodeJS.ProcessEnv = process.env): Promise<string | undefined> {
  const named = given ?? env.HF_TOKEN ?? env.HUGGING_FACE_HUB_TOKEN;
  if (named) return named.trim();
  if (/^(1|true|yes|on)$/i.test(env.HF_HUB_DISABLE_IMPLICIT_TOKEN ?? "")) return undefined;
  const home = env.HF_HOME ?? join(env.XDG_CACHE_HOME || join(homedir(), ".cache"), "huggingface");
  const path = env.HF_TOKEN_PATH ?? join(home, "token");
  const stored = await readFile(path, "utf8").catch(() => ""); // nobody logged in
  return stored.trim() || undefined;
}

export interface ConnectOptions {
  readonly token?: string;
  readonly signal?: AbortSignal;
  /** Default 5. */
  readonly tries?: number;
}

/** `what` names the model in messages. */
export async function connect(what: string, { token: given, signal, tries }: ConnectOptions): Promise<HubConnection> {
  const token = await hubToken(given);
  const endpoint = hubEndpoint();
  return {
    endpoint,
    async fetch(url, init = {}) {
      const headers = new Headers(init.headers);
      if (token) headers.set("authorization", `Bearer ${token}`); // fetch drops it where a redirect leaves the host
      const attempt = async () => {
        const response = await fetch(url, { ...init, headers, signal });
        if (response.ok) return response;
        throw await statusError(response, what, endpoint, token !== undefined);
      };
      return retrying(attempt, { signal, tries });
    },
  };
}

/** An error that another try may not meet. */
class Passing extends NibbleError {
  waitMs: number | undefined;
}

async function statusError(
  response: Response,
  what: string,
  endpoint: string,
  hasToken: boolean,
): Promise<NibbleError> {
  const { status, headers } = response;
  const code = headers.get("x-error-code") ?? "";
  const said = headers.get("x-error-message") ?? (await response.text().catch(() => "")).slice(0, 200);
  const page = `${endpoint}/${what.replace(/@.*$/, "")}`;
  const login = hasToken
    ? "The token given has no access to it."
    : "If it is private or gated, set HF_TOKEN (https://huggingface.co/settings/tokens).";
  if (status === 401 || status === 403) {
    if (code === "GatedRepo") {
      return new NibbleError("network", `${what} is gated: accept its conditions at ${page}. ${login}`, {
        param: "token",
      });
    }
    return new NibbleError("not_found", `${what} is not on ${endpoint}, or not for everybody (${status}). ${login}`);
  }
  if (status === 404) {
    const missing =
      { RevisionNotFound: "has no such revision", EntryNotFound: "has no such file" }[code] ?? "does not exist";
    return new NibbleError("not_found", `${what} ${missing} on ${endpoint} (404).`);
  }
  const message = `${what}: ${endpoint} answered ${status} ${response.statusText}${said ? `: ${said}` : ""}.`;
  if (status !== 408 && status !== 429 && status < 500) return new NibbleError("network", message);
  const passing = new Passing("network", message);
  const seconds = Number(headers.get("retry-after"));
  if (seconds > 0) passing.waitMs = Math.min(1000 * seconds, LONGEST_WAIT_MS);
  return passing;
}

interface Retrying {
  readonly signal?: AbortSignal;
  readonly tries?: number;
  /** Bytes so far: whenever there are more, the tries are counted anew. */
  readonly progress?: () => number;
}

/** Repeats what the network or a busy server spoiled; anything else passes through at once. */
export async function retrying<T>(
  attempt: () => Promise<T>,
  { signal, tries = TRIES, progress = () => 0 }: Retrying = {},
): Promise<T> {
  for (let round = 1, reached = progress(); ; round++) {
    try {
      return await attempt();
    } catch (error) {
      if (signal?.aborted) throw new NibbleError("aborted", "The download was cancelled.", { cause: error });
      const isNetwork = error instanceof Passing || !(error instanceof NibbleError);
      if (!isNetwork) throw error;
      if (progress() > reached) round = 1;
      reached = progress();
      if (round >= tries) throw networkError(error);
      const waitMs = (error instanceof Passing && error.waitMs) || FIRST_WAIT_MS * 2 ** (round - 1);
      await pause(waitMs, signal);
    }
  }
}

function networkError(error: unknown): NibbleError {
  if (error instanceof NibbleError) return error;
  const { message, cause } = error as Error;
  const reason = cause instanceof Error ? cause.message || (cause as NodeJS.ErrnoException).code : message;
  const { HTTPS_PROXY, https_proxy } = process.env;
  const hint =
    (HTTPS_PROXY ?? https_proxy)
      ? " Node does not use HTTPS_PROXY by itself; `hf download` does, and what it brings is found in the cache."
      : "";
  return new NibbleError("network", `The hub could not be reached (${reason}).${hint}`, { cause: error });
}

async function pause(waitMs: number, signal?: AbortSignal): Promise<void> {
  await new Promise<void>((resolve) => {
    const done = () => {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    };
    const timer = setTimeout(done, waitMs);
    signal?.addEventListener("abort", done);
  });
}
