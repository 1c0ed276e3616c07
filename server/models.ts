/**
 * The models a server offers: loaded when first asked for, unloaded when idle or when another needs their memory. A
 * model that fails to load answers with its own error and leaves the others alone.
 */
import { NibbleError } from "../src/errors.ts";
import type { Engine } from "../src/runtime/engine.ts";
import { ApiError } from "./openai/errors.ts";

/** One model that can be loaded. */
export interface ModelSource {
  /** What `/v1/models` lists and the `model` field names. */
  readonly id: string;
  /** Unix seconds. */
  readonly created: number;
  /** Weights and KV cache, as far as known before loading; 0 where it is not. */
  readonly sizeBytes: number;
  /** SHA-256 of the list of its files and their hashes, in hex, where it has one. */
  readonly digest?: string;
  /** Where its files lie, absolute, for pages that run it themselves; left out, they are not offered. */
  readonly folder?: string;
  /** The registry does the queueing: an engine that refuses before `maxWaiting` requests wait would be stricter. */
  load(limits: { readonly maxWaiting: number }): Promise<Engine>;
}

export interface RegistryOptions {
  /** Requests of one model that wait beyond those it decodes together; more are answered 503. */
  readonly queueLimit?: number;
  /** A model without requests for this long is unloaded; 0 keeps it. */
  readonly idleMs?: number;
  /** Loaded models together; the least recently used idle ones make room. */
  readonly memoryBytes?: number;
  readonly onEvent?: (message: string, error?: unknown) => void;
}

export type ModelState = "unloaded" | "loading" | "ready" | "failed";

export interface ModelStatus {
  readonly id: string;
  readonly created: number;
  readonly state: ModelState;
  readonly active: number;
  readonly engine: Engine | undefined;
  readonly sizeBytes: number;
  readonly digest: string | undefined;
  /** Unix milliseconds of the last request's end. */
  readonly lastUsed: number;
}

/** A loaded model, kept for one request; `release` it when the answer has ended. */
export interface Lease {
  readonly id: string;
  readonly engine: Engine;
  /** A place for one generation; throws `overloaded` beyond the queue's limit. */
  admit(count: number): () => void;
  /** To be told of errors of the engine: a dead one is dropped, the next request loads it again. */
  report(error: unknown): void;
  release(): void;
}

interface Entry {
  readonly source: ModelSource;
  loading: Promise<Engine> | undefined;
  engine: Engine | undefined;
  failure: unknown;
  /** It failed in the middle of an answer: it is loaded afresh once nobody uses it. */
  broken: boolean;
  leases: number;
  generations: number;
  lastUsed: number;
  idleTimer: ReturnType<typeof setTimeout> | undefined;
}

/** 8 requests decode together and 64 wait: about what one CPU can answer within a client's usual minute. */
export const DEFAULT_QUEUE_LIMIT = 64;
/** Requests that have a place may wait as well: for their prompt's turn, or, cut, for the end of the step. */
const ALSO_WAITING = 256;

export class ModelRegistry {
  private readonly entries = new Map<string, Entry>();
  private readonly queueLimit: number;
  readonly idleMs: number;
  private readonly memoryBytes: number;
  private readonly onEvent: (message: string, error?: unknown) => void;
  /** Loads run one after the other: two at once would both count on the same free memory. */
  private turn: Promise<unknown> = Promise.resolve();

  constructor(sources: readonly ModelSource[], options: RegistryOptions = {}) {
    for (const source of sources) {
      if (this.entries.has(source.id)) {
        throw new NibbleError("bad_option", `Two models are called ${source.id}; give one another name.`);
      }
      this.entries.set(source.id, {
        source,
        loading: undefined,
        engine: undefined,
        failure: undefined,
        broken: false,
        leases: 0,
        generations: 0,
        lastUsed: 0,
        idleTimer: undefined,
      });
    }
    this.queueLimit = options.queueLimit ?? DEFAULT_QUEUE_LIMIT;
    this.idleMs = options.idleMs ?? 0;
    this.memoryBytes = options.memoryBytes ?? Number.POSITIVE_INFINITY;
    this.onEvent = options.onEvent ?? (() => undefined);
  }

  list(): ModelStatus[] {
    return Array.from(this.entries.values(), status);
  }

  /** By its id, or as Ollama's clients write it (`name:latest`); undefined where there is none. */
  find(id: string): ModelStatus | undefined {
    const entry = this.entry(id);
    return entry && status(entry);
  }

  private entry(id: string): Entry | undefined {
    return this.entries.get(id) ?? this.entries.get(id.replace(/:latest$/, ""));
  }

  /** Loads the model where needed. With no name given, the first one answers. */
  async use(id: string | undefined): Promise<Lease> {
    const entry = id === undefined || id === "" ? [...this.entries.values()][0] : this.entry(id);
    if (!entry) {
      throw new ApiError(404, "model_not_found", `The model '${id ?? ""}' does not exist; see /v1/models.`, {
        param: "model",
        code: "not_found",
      });
    }
    entry.leases++;
    clearTimeout(entry.idleTimer);
    try {
      return this.lease(entry, entry.engine ?? (await this.load(entry)));
    } catch (error) {
      this.release(entry);
      throw error;
    }
  }

  private lease(entry: Entry, engine: Engine): Lease {
    let held = true;
    return {
      id: entry.source.id,
      engine,
      admit: (count) => this.admit(entry, engine, count),
      report: (error) => this.report(entry, engine, error),
      release: () => {
        if (held) this.release(entry);
        held = false;
      },
    };
  }

  private admit(entry: Entry, engine: Engine, count: number): () => void {
    const places = engine.info.maxBatch + this.queueLimit;
    if (entry.generations + count > places) {
      const message = `${entry.source.id} has ${entry.generations} requests running and waiting, its limit is ${places}.`;
      throw new ApiError(503, "overloaded", `${message} Please try again later.`, {
        code: "overloaded",
        retryAfterSeconds: 1 + Math.floor(entry.generations / engine.info.maxBatch),
      });
    }
    entry.generations += count;
    let held = true;
    return () => {
      if (held) entry.generations -= count;
      held = false;
    };
  }

  private release(entry: Entry): void {
    entry.leases--;
    entry.lastUsed = Date.now();
    if (entry.leases > 0 || !entry.engine) return;
    if (entry.broken) this.unloadEntry(entry, "it failed").catch(() => undefined);
    if (this.idleMs === 0) return;
    clearTimeout(entry.idleTimer);
    entry.idleTimer = setTimeout(() => {
      if (entry.leases === 0) this.unloadEntry(entry, "idle").catch(() => undefined);
    }, this.idleMs);
    (entry.idleTimer as { unref?: () => void }).unref?.(); // Node: an idle model keeps no process alive
  }

  /** Others may still be answered by an engine that healed itself, so it goes when the last of them has left. */
  private report(entry: Entry, engine: Engine, error: unknown): void {
    if (!(error instanceof NibbleError) || error.code !== "engine" || entry.engine !== engine) return;
    if (!entry.broken) this.onEvent(`${entry.source.id}: the engine failed`, error);
    entry.broken = true;
  }

  private load(entry: Entry): Promise<Engine> {
    if (entry.loading) return entry.loading;
    const loading = this.turn
      .catch(() => undefined)
      .then(async () => {
        await this.makeRoom(entry);
        const start = performance.now();
        const engine = await entry.source.load({ maxWaiting: this.queueLimit + ALSO_WAITING });
        entry.engine = engine;
        entry.failure = undefined;
        this.onEvent(`${entry.source.id}: loaded in ${Math.round(performance.now() - start)} ms`);
        return engine;
      })
      .catch((error) => {
        entry.failure = error;
        this.onEvent(`${entry.source.id}: could not be loaded`, error);
        throw forClients(entry.source.id, error);
      })
      .finally(() => {
        entry.loading = undefined;
      });
    entry.loading = loading;
    this.turn = loading;
    return loading;
  }

  private async makeRoom(wanted: Entry): Promise<void> {
    const need = wanted.source.sizeBytes;
    if (need > this.memoryBytes) {
      const { id } = wanted.source;
      throw new NibbleError("no_space", `${id} takes ${need} bytes; the budget is ${this.memoryBytes}.`);
    }
    const others = [...this.entries.values()].filter((entry) => entry !== wanted && entry.engine);
    let used = others.reduce((sum, entry) => sum + usedBytes(entry), 0);
    const idle = others.filter((entry) => entry.leases === 0).sort((a, b) => a.lastUsed - b.lastUsed);
    for (const entry of idle) {
      if (used + need <= this.memoryBytes) return;
      used -= usedBytes(entry);
      await this.unloadEntry(entry, `made room for ${wanted.source.id}`);
    }
    if (used + need <= this.memoryBytes) return;
    throw new ApiError(503, "overloaded", "The models in use fill the memory budget. Please try again later.", {
      code: "overloaded",
      retryAfterSeconds: 5, // an answer of some hundred tokens
    });
  }

  private async unloadEntry(entry: Entry, why: string): Promise<void> {
    const { engine } = entry;
    if (!engine) return;
    entry.engine = undefined;
    entry.broken = false;
    this.onEvent(`${entry.source.id}: unloaded (${why})`);
    await engine.dispose();
  }

  /** Unloads one model that no request uses; false where it is in use or not loaded. */
  async unload(id: string): Promise<boolean> {
    const entry = this.entry(id);
    if (!entry?.engine || entry.leases > 0) return false;
    await this.unloadEntry(entry, "asked to");
    return true;
  }

  async dispose(): Promise<void> {
    for (const entry of this.entries.values()) clearTimeout(entry.idleTimer);
    await Promise.all(Array.from(this.entries.values(), (entry) => this.unloadEntry(entry, "the server ends")));
  }
}

/** What a client's own request can cause too says what was wrong with it: of a load that would be the server's paths. */
function forClients(id: string, error: unknown): unknown {
  const ownWords = ["not_found", "bad_option", "unsupported", "context_length"];
  if (error instanceof ApiError || (error instanceof NibbleError && !ownWords.includes(error.code))) return error;
  return new ApiError(503, "model_not_loadable", `The model '${id}' could not be loaded.`, { code: "bad_file" });
}

function usedBytes({ engine, source }: Entry): number {
  if (!engine) return 0;
  const { weightBytes, kvBytesAllocated } = engine.info.memory;
  return Math.max(source.sizeBytes, weightBytes + kvBytesAllocated);
}

function status(entry: Entry): ModelStatus {
  const { source, engine, leases, lastUsed } = entry;
  const { id, created, digest } = source;
  const state = engine ? "ready" : entry.loading ? "loading" : entry.failure ? "failed" : "unloaded";
  const sizeBytes = engine ? usedBytes(entry) : source.sizeBytes;
  return { id, created, state, active: leases, engine, sizeBytes, digest, lastUsed };
}
