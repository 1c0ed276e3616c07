/** The worker thread that owns a model: session, KV cache, sampling, text. Speaks engine-protocol.ts. */
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parentPort, workerData } from "node:worker_threads";
import { capabilitiesOf } from "../arch/capabilities.ts";
import { NibbleError } from "../errors.ts";
import { tensorReader } from "../export/open-graph.ts";
import { type IntegerPrompts, withIntegerProducts } from "../export/prompt-products.ts";
import { GrammarCache } from "../grammar/grammar.ts";
import { evictionPolicy } from "../kv/eviction.ts";
import { withEviction } from "../kv/eviction-graph.ts";
import { withFloatPrefill } from "../kv/int8-prefill.ts";
import { policyOf } from "../kv/policies.ts";
import { byRows } from "../onnx/by-rows.ts";
import type { Ort } from "../onnx/ort.ts";
import { decodeModel, type ModelProto } from "../onnx/proto.ts";
import { DraftModel } from "../runtime/draft.ts";
import { embedPrompt } from "../runtime/embed.ts";
import type { GenerateOptions } from "../runtime/engine.ts";
import { type ModelOffer, readOffer } from "../runtime/folder.ts";
import { Generation } from "../runtime/generate.ts";
import { type CacheSession, openCache } from "../runtime/open-cache.ts";
import { resolveSampling } from "../runtime/sampling.ts";
import { Scheduler } from "../runtime/scheduler.ts";
import { DecoderSession } from "../runtime/session.ts";
import { loadTokenizer } from "../tokenizer/hf-tokenizer.ts";
import type { Tokenizer } from "../tokenizer/tokenizer.ts";
import { type FromWorker, type ToWorker, toWire, type WorkerSetup } from "./engine-protocol.ts";
import { addsExactly } from "./exact-products.ts";
import { nodeFolder } from "./files.ts";
import { collapsePages } from "./huge-pages.ts";
import { type OpenSessionOptions, openSession, ortFor } from "./ort.ts";
import { cacheFingerprint, PrefixFiles } from "./prefix-files.ts";
import type { PromptProducts } from "./prompt-choice.ts";

/** Waits no longer for the main thread to hand on a first token. */
const LONGEST_REST_MS = 5;
/** What a client in another process takes to read it. */
const READER_MS = 1;
/** Milliseconds between reports of counters to the main thread while something runs. */
const STATS_INTERVAL_MS = 250;

const port = parentPort as NonNullable<typeof parentPort>;
const say = (message: FromWorker): void => port.postMessage(message);

/** The pause until the main thread has handed on an answer's first token and its reader has read it. */
class Rest {
  private over: (() => void) | undefined;

  /** The main thread has. */
  heard(): void {
    if (this.over) setTimeout(this.over, READER_MS);
  }

  begin(): Promise<void> {
    return new Promise((resolve) => {
      const over = () => {
        clearTimeout(longest);
        this.over = undefined;
        resolve();
      };
      const longest = setTimeout(over, LONGEST_REST_MS);
      this.over = over;
    });
  }
}

class ModelWorker {
  private readonly aborts = new Map<number, AbortController>();
  private embedder: ReturnType<typeof openSession> | undefined;
  /** What was said last, to say nothing twice. */
  private reported = "";
  private readonly grammars: GrammarCache;
  private readonly closing = new AbortController();
  /** Ends before this thread may. */
  private readonly pages: Promise<unknown> | undefined;
  private readonly timer = setInterval(() => this.reportStats(), STATS_INTERVAL_MS);

  constructor(
    private readonly setup: WorkerSetup,
    private readonly offer: ModelOffer,
    private readonly ort: Ort,
    private readonly tokenizer: Tokenizer,
    private readonly session: CacheSession,
    private readonly draft: DecoderSession | undefined,
    private readonly scheduler: Scheduler,
    private readonly rest: Rest,
    private readonly vocabSize: number,
    private readonly prefixes: PrefixFiles | undefined,
  ) {
    this.grammars = new GrammarCache(tokenizer);
    if (setup.binding === "capi") {
      const isBusy = () => scheduler.stats().running > 0;
      this.pages = collapsePages({ isBusy, signal: this.closing.signal });
    }
  }

  receive(message: ToWorker): void {
    switch (message.kind) {
      case "generate":
        void this.generate(message.request, message.prompt, message.options);
        break;
      case "abort":
        this.aborts.get(message.request)?.abort();
        break;
      case "embed":
        void this.embed(message.request, message.prompts);
        break;
      case "heard":
        this.rest.heard();
        break;
      case "close":
        void this.close();
    }
  }

  private async generate(request: number, prompt: readonly number[], options: GenerateOptions): Promise<void> {
    const abort = new AbortController();
    this.aborts.set(request, abort);
    try {
      const constraint = options.grammar && this.grammars.start(options.grammar);
      const sampling = resolveSampling(options, this.offer.sampling, this.vocabSize);
      const limits = { contextLength: textLength(this.setup) };
      const generation = new Generation(this.tokenizer, prompt, options, sampling, limits, constraint);
      const promptLogprobs = options.promptLogprobs ? (options.topLogprobs ?? 0) : undefined;
      const stream = this.scheduler.submit({ generation, signal: abort.signal, promptLogprobs });
      let first = true;
      for await (const piece of stream) {
        if (piece.finish !== undefined) this.reportStats();
        say({ kind: "piece", request, piece, first });
        first = false;
      }
    } catch (error) {
      say({ kind: "error", request, error: toWire(error) });
    } finally {
      this.aborts.delete(request);
    }
  }

  private async embed(request: number, prompts: readonly (readonly number[])[]): Promise<void> {
    try {
      const { contextLength } = this.setup;
      const vectors: Float32Array[] = [];
      for (const prompt of prompts) {
        if (prompt.length === 0)
          throw new NibbleError("bad_option", "An empty text has no embedding.", { param: "input" });
        if (prompt.length > contextLength) {
          throw new NibbleError(
            "context_length",
            `A text has ${prompt.length} tokens; this model takes ${contextLength}.`,
            {
              param: "input",
            },
          );
        }
        vectors.push(await embedPrompt(this.ort, await this.openEmbedder(), prompt));
      }
      say({ kind: "vectors", request, vectors });
    } catch (error) {
      say({ kind: "error", request, error: toWire(error) });
    }
  }

  private openEmbedder(): ReturnType<typeof openSession> {
    const path = this.offer.variants.embed;
    if (!path) {
      throw new NibbleError(
        "unsupported",
        `${this.setup.id} has no graph that gives hidden states (${this.offer.graph.replace(/\.onnx$/, ".embed.onnx")}); export it again with Nibble.`,
      );
    }
    this.embedder ??= openSession(this.ort, join(this.setup.folder, path), this.setup);
    return this.embedder;
  }

  private reportStats(): void {
    const { scheduler, session } = this;
    const now = JSON.stringify([scheduler.stats(), session.kvBytesAllocated]);
    if (now === this.reported) return;
    this.reported = now;
    say({ kind: "stats", stats: this.scheduler.stats(), kvBytesAllocated: this.session.kvBytesAllocated });
  }

  private async close(): Promise<void> {
    clearInterval(this.timer);
    this.closing.abort();
    await this.scheduler.close();
    await this.prefixes?.close();
    await this.pages;
    await (await this.embedder)?.release();
    await this.session.dispose();
    await this.draft?.dispose();
    port.close();
  }
}

/** Tokens of prompt and answer together: what the cache holds, or no end where it forgets. */
function textLength({ contextLength, window }: WorkerSetup): number {
  return window ? Number.MAX_SAFE_INTEGER : contextLength;
}

interface OpenedDecoder {
  readonly session: CacheSession;
  /** Pieces of a prompt are computed in another way than a few tokens (by-rows.ts). */
  readonly readsInPieces: boolean;
}

type DecoderSetup = Pick<WorkerSetup, "folder" | "graph" | "contextLength" | "eviction" | "promptProducts">;

async function openDecoder(
  ort: Ort,
  { folder, graph, contextLength, eviction, promptProducts }: DecoderSetup,
  options: OpenSessionOptions,
): Promise<OpenedDecoder> {
  const path = join(folder, graph);
  const stored = decodeModel(await readFile(path), path);
  const model = eviction ? withEviction(stored, evictionPolicy(eviction.policy)) : stored;
  const many = options.device === "cpu" && !eviction ? withFloatPrefill(model) : model;
  const prompts = promptProducts === "int8" ? await integerPrompts(many, folder, graph) : { model: many, files: [] };
  const run = byRows(model, prompts.model);
  const opened = await openSession(ort, path, options, run === stored ? undefined : run, prompts.files);
  const session = openCache(ort, opened, model, path, contextLength, eviction);
  return { session, readsInPieces: run !== model };
}

async function integerPrompts(model: ModelProto, folder: string, graph: string): Promise<IntegerPrompts> {
  const reader = tensorReader(nodeFolder(folder), graph.slice(0, graph.lastIndexOf("/") + 1));
  try {
    return await withIntegerProducts(model, reader.read);
  } finally {
    await reader.close();
  }
}

/** The session of `--draft`; errors: `unsupported` where a cache cannot be cut back to fewer tokens. */
async function openDraft(
  ort: Ort,
  draft: NonNullable<WorkerSetup["draft"]>,
  model: CacheSession,
  options: OpenSessionOptions,
): Promise<DecoderSession> {
  const { session } = await openDecoder(ort, { ...draft, promptProducts: "stored" }, options);
  for (const one of [model, session]) {
    if (one.can.cut && (one === model || one instanceof DecoderSession)) continue;
    throw new NibbleError(
      "unsupported",
      `${one.name}: its cache grows by concatenation or keeps a state, so wrong guesses could not be cut off again; --draft needs GroupQueryAttention in both models.`,
      { param: "draft" },
    );
  }
  return session as DecoderSession;
}

/** The prefix cache on disk, where one is wanted; error `unsupported` where this cache cannot be kept. */
async function openPrefixFiles(
  { folder, graph, prefixFiles, eviction }: WorkerSetup,
  { manifest }: ModelOffer,
  canCopy: boolean,
): Promise<PrefixFiles | undefined> {
  if (!prefixFiles) return undefined;
  if (!canCopy) {
    const what = eviction ? `--kv-policy ${eviction.policy}` : graph;
    throw new NibbleError("unsupported", `${what}: its cache is not kept for later prompts, on disk neither.`, {
      param: "prefixCacheDir",
    });
  }
  const fingerprint = await cacheFingerprint(folder, graph, manifest);
  return new PrefixFiles(prefixFiles.dir, fingerprint, prefixFiles.maxBytes, (note) => say({ kind: "note", note }));
}

/** What runs of what was chosen: int8 products only on a CPU that adds them up exactly. */
async function possibleProducts(ort: Ort, { id, promptProducts }: WorkerSetup): Promise<PromptProducts> {
  if (promptProducts === "stored" || (await addsExactly(ort))) return promptProducts;
  const note = `${id}: this CPU adds up 8-bit products in 16 bits, so prompts are read with weights as stored, which takes longer.`;
  say({ kind: "note", note });
  return "stored";
}

async function start(wanted: WorkerSetup): Promise<ModelWorker> {
  const offer = await readOffer(nodeFolder(wanted.folder));
  const tokenizer = loadTokenizer(offer.files, { config: offer.config, chatTemplate: wanted.chatTemplate });
  const ort = await ortFor(wanted.binding);
  const setup = { ...wanted, promptProducts: await possibleProducts(ort, wanted) };
  // two thread pools that wait for work by spinning would take the cores from each other
  const options = { ...setup, spinBetweenRuns: setup.draft === undefined };
  const { session, readsInPieces } = await openDecoder(ort, setup, options);
  const draft = setup.draft && (await openDraft(ort, setup.draft, session, options));
  const vocabSize = session.shape.vocabSize ?? tokenizer.vocabSize;
  const { without, recomputeAbove } = capabilitiesOf(offer.config, setup.contextLength);
  const { id, window, eviction } = setup;
  const contextLength = textLength(setup);
  const { can } = session;
  const maxBatch = without.batching || !can.batch ? 1 : setup.maxBatch;
  const prefixStore = await openPrefixFiles(setup, offer, can.copy);
  const rest = new Rest();
  const scheduler = new Scheduler(session, {
    ...setup,
    draft: draft && new DraftModel(draft, draft.contextLength),
    recomputeAbove,
    maxBatch,
    speculate: setup.speculate && can.cut && !without.speculation,
    rest: () => rest.begin(),
    wholeBlocks: readsInPieces,
    prefixStore,
    prefixCacheBytes: without["prefix cache"] || !can.copy ? 0 : setup.prefixCacheBytes,
  });
  say({
    kind: "ready",
    info: {
      id,
      modelType: offer.modelType,
      file: setup.graph,
      contextLength,
      vocabSize,
      binding: `node-${setup.device}${setup.binding === "capi" ? "-capi" : ""}`,
      kv: { format: session.shape.kvFormat, ...policyOf({ window, eviction }) },
      promptProducts: setup.promptProducts,
      maxBatch,
    },
    kvBytesPerToken: session.shape.kvBytesPerToken,
  });
  return new ModelWorker(setup, offer, ort, tokenizer, session, draft, scheduler, rest, vocabSize, prefixStore);
}

try {
  const worker = await start(workerData as WorkerSetup);
  port.on("message", (message: ToWorker) => worker.receive(message));
} catch (error) {
  say({ kind: "failed", error: toWire(error) });
}
