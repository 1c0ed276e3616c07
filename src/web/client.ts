/** The page's side of the worker that owns the engine: starting it, asking it, and starting it again when it died. */
import { NibbleError } from "../errors.ts";
import type { GenerateOptions, Piece } from "../runtime/engine.ts";
import type { LoadEvent, LoadedModel, LoadRequest, Prompt, WorkerMethods } from "./protocol.ts";
import { Client, type Methods } from "./rpc.ts";

/** One worker and the model it holds. `M` is more than WorkerMethods where a page's worker does more. */
export class EngineWorker<M extends WorkerMethods & Methods<M> = WorkerMethods> {
  private worker: Worker | undefined;
  private client: Client<M> | undefined;
  /** The model that is open now. */
  model: LoadedModel | undefined;
  private lastLoad: LoadRequest | undefined;
  private lastStored: string | undefined;

  constructor(
    private readonly start: () => Worker,
    private readonly onDeath: (error: NibbleError) => void = () => undefined,
  ) {}

  /** The connection, with the worker started on first use. */
  get rpc(): Client<M> {
    if (this.client) return this.client;
    const worker = this.start();
    const client = new Client<M>(worker);
    const die = (what: string) => this.worker === worker && this.die(what);
    const reason = ({ message }: ErrorEvent) => message?.replace(/^Uncaught (\w*Error: )?/, "").replace(/\.$/, "");
    worker.addEventListener("error", (event) => die(reason(event) || "it could not be started"));
    worker.addEventListener("messageerror", () => die("a message could not be read"));
    this.worker = worker;
    this.client = client;
    return client;
  }

  private die(what: string): void {
    const error = new NibbleError("engine", `The engine's worker stopped: ${what}. Load the model again to go on.`);
    this.terminate(error);
    this.onDeath(error);
  }

  /**
   * Asks an idle worker for a sign of life; one that the browser ended in a tab that slept says nothing, not even an
   * error.
   */
  async check(timeoutMs: number): Promise<void> {
    const { worker } = this;
    if (!worker || !this.model) return;
    const silence = new Promise<"silent">((resolve) => setTimeout(() => resolve("silent"), timeoutMs));
    const sign = (this.rpc as Client<WorkerMethods>).call("stats", undefined).then(
      () => "alive",
      () => "alive",
    );
    if ((await Promise.race([sign, silence])) === "silent" && this.worker === worker) this.die("it does not answer");
  }

  async load(
    request: LoadRequest,
    options: { onEvent?: (event: LoadEvent) => void; signal?: AbortSignal } = {},
  ): Promise<LoadedModel> {
    // A build cannot be swapped inside a worker, and WASM memory only grows: every load gets a fresh one.
    if (this.model) this.terminate();
    // Addresses are relative to the page; the worker's script lies elsewhere.
    const { source } = request;
    const url = source.kind === "url" ? new URL(source.url, document.baseURI).href : "";
    this.lastLoad = source.kind === "url" ? { ...request, source: { kind: "url", url } } : request;
    this.model = await (this.rpc as Client<WorkerMethods>).call("load", this.lastLoad, options);
    this.lastStored = this.model.stored.id;
    return this.model;
  }

  /** Opens the same model again in a new worker, from what is stored. */
  reload(options: { onEvent?: (event: LoadEvent) => void } = {}): Promise<LoadedModel> {
    if (!this.lastLoad) throw new NibbleError("engine", "No model was loaded yet.");
    const stored = this.lastStored;
    this.terminate();
    return this.load(stored ? { ...this.lastLoad, source: { kind: "stored", id: stored } } : this.lastLoad, options);
  }

  /** Pieces of an answer; leaving the loop stops it. */
  generate(prompt: Prompt, options: GenerateOptions = {}): AsyncGenerator<Piece> {
    const { signal, ...rest } = options;
    return (this.rpc as Client<WorkerMethods>).stream("generate", { prompt, options: rest }, signal);
  }

  /** Ends the worker and with it all memory it holds. */
  terminate(reason = new NibbleError("aborted", "The engine was closed.")): void {
    this.worker?.terminate();
    this.client?.fail(reason);
    this.worker = undefined;
    this.client = undefined;
    this.model = undefined;
  }
}
