/** The worker's side: it holds one model, answers the page's requests, and lends its engine to other ports. */
import { NibbleError } from "../errors.ts";
import { decodeModel } from "../onnx/proto.ts";
import type { Engine, Piece } from "../runtime/engine.ts";
import { graphWithCache, hasGpuInt8 } from "./cache-choice.ts";
import { type BuildChoice, chooseBuild, probeDevice } from "./device.ts";
import { type EngineInPage, openWebEngine, tokenizerFiles } from "./engine.ts";
import { graphFor } from "./integer-twin.ts";
import { loadOrt } from "./ort.ts";
import type { EngineMethods, GenerateRequest, LoadEvent, LoadedModel, LoadRequest, WorkerMethods } from "./protocol.ts";
import { openRemote, type RemoteFile, type RemoteModel } from "./remote.ts";
import { type Context, type Handlers, type Port, serve } from "./rpc.ts";
import { checkFit, kvBytesOf, type Selection, selectFiles } from "./select.ts";
import { ModelStore, type StoredModel } from "./store.ts";
import { speedOf, threadsThatPay } from "./thread-choice.ts";

/** What a worker script calls once; `more` are methods beyond WorkerMethods. */
export function hostEngine(port: Port, more: object = {}): void {
  let engine: EngineInPage | undefined;
  const needEngine = (): EngineInPage => {
    if (!engine) throw new NibbleError("engine", "No model is open.");
    return engine;
  };

  const load = async (request: LoadRequest, context: Context<LoadEvent>): Promise<LoadedModel> => {
    if (engine) throw new NibbleError("engine", "This worker holds a model already; start another worker.");
    const opened = await open(request, context);
    engine = opened.engine;
    return opened.loaded;
  };

  const handlers: Handlers<WorkerMethods> = {
    ...engineHandlers(needEngine),
    probe: () => probeDevice(),
    async peek(source, { signal }) {
      const { id, origin, files } = await openRemote(source, signal);
      const report = await probeDevice();
      const { sizeBytes } = selectFiles(files, chooseBuild(report), report);
      const graphs = files.map(({ path }) => path).filter((path) => path.endsWith(".onnx"));
      return { id, origin, downloadBytes: sizeBytes, graphs };
    },
    load,
    models: async () => (await ModelStore.open()).list(),
    remove: async (id) => (await ModelStore.open()).delete(id) as Promise<undefined>,
    async forgetPrompts(id) {
      if (engine?.info.id === id) await engine.forgetPrompts();
      await (await ModelStore.open()).forgetPrompts(id);
      return undefined;
    },
    async graphs(id) {
      const folder = await (await ModelStore.open()).folder(id);
      return (await folder.list()).filter((path) => path.endsWith(".onnx") && !path.endsWith(".embed.onnx"));
    },
    async connect(other) {
      serve(other, engineHandlers(needEngine));
      return undefined;
    },
    ...more,
  };
  serve(port, handlers);
}

/** The requests that go to whatever engine is open. */
function engineHandlers(engine: () => Engine): Handlers<EngineMethods> {
  return {
    info: () => engine().info,
    tokenizerFiles: () => tokenizerFilesOf.get(engine()) ?? new Map(),
    async generate(request, context) {
      for await (const piece of pieces(engine(), request, context.signal)) context.emit(piece);
      return undefined;
    },
    embed: (prompts) => engine().embed(prompts),
    stats: () => engine().stats(),
  };
}

const tokenizerFilesOf = new WeakMap<Engine, ReadonlyMap<string, Uint8Array>>();

function pieces(engine: Engine, { prompt, options }: GenerateRequest, signal: AbortSignal): AsyncIterable<Piece> {
  const { tokenizer } = engine;
  if (prompt.kind === "chat") return engine.chat(prompt.messages, { ...options, ...prompt.template, signal });
  const ids = prompt.kind === "ids" ? prompt.ids : tokenizer.encode(prompt.text);
  return engine.generate(ids, { ...options, signal });
}

/** Tokens of context where neither the user nor the model says less: the cache of more would not fit most phones. */
const DEFAULT_CONTEXT = 4096;

async function open(
  request: LoadRequest,
  { signal, emit }: Context<LoadEvent>,
): Promise<{ engine: EngineInPage; loaded: LoadedModel }> {
  const report = await probeDevice();
  const chosen = chooseBuild(report, request.device);
  emit({ stage: "look", choice: chosen });

  const store = await ModelStore.open();
  const stored = await fetched(store, request, chosen, report, signal, emit);
  const choice = await withThreads(chosen, request, store, stored.id);
  const folder = await store.folder(stored.id);
  const paths = await Promise.all((await folder.list()).map((path) => sized(folder, path)));
  const selected = selectFiles(paths, choice, report, request.graph).graph;
  const there = paths.map(({ path }) => path);
  const graph = graphWithCache(there, selected, request, choice);
  const directory = await store.directory(stored.id);
  const onMatrix = (done: number, total: number) => {
    signal.throwIfAborted();
    emit({ stage: "prepare", done, total });
  };
  const place = request.asStored ? { folder, graph } : await graphFor(directory, folder, graph, choice, onMatrix);
  const started = performance.now();
  emit({ stage: "runtime" });
  const ort = await loadOrt(choice, request.ortUrl, hasGpuInt8(request, choice));
  signal.throwIfAborted();
  emit({ stage: "session" });
  const { context, growingCache: growing, prefixCacheBytes: maxBytes } = request;
  const { id } = stored;
  const onSteps = (steps: readonly number[]) => {
    const speed = choice.device === "wasm" ? speedOf(steps, Date.now()) : undefined;
    // a full disk, or another tab that notes the same, costs the note only
    if (speed) void store.noteSpeed(id, choice.threads, speed).catch(() => undefined);
  };
  const prefixes = { directory, maxBytes };
  const asked = { id, graph, choice, context, defaultContext: DEFAULT_CONTEXT };
  const options = { ...asked, growing, cache: request, onSteps, prefixes };
  const engine = await openWebEngine(ort, folder, options, place);
  tokenizerFilesOf.set(engine, await tokenizerFiles(folder));
  const loadMs = performance.now() - started;
  const hasChatTemplate = engine.tokenizer.chatTemplate !== undefined;
  const { info } = engine;
  const notes = info.kv.keeps ? [info.kv.keeps] : [];
  return { engine, loaded: { info, choice, hasChatTemplate, loadMs, notes, stored } };
}

/** As many threads as were asked for, else as many as pay here. */
async function withThreads(
  chosen: BuildChoice,
  { threads, kv }: LoadRequest,
  store: ModelStore,
  id: string,
): Promise<BuildChoice> {
  if (threads !== undefined) return { ...chosen, threads };
  if (chosen.threads === 1) return chosen;
  const why = (reason: string) => ({
    ...chosen,
    threads: 1,
    reason: `${chosen.reason.replace(/,[^,]*$/, "")}, ${reason}`,
  });
  // its attention takes longer on two threads than on one: see cache-choice.ts
  if (kv === "int8" && chosen.device === "wasm") return why("1 thread: more do not pay with an int8 cache");
  if (threadsThatPay(chosen.threads, await store.speeds(id), Date.now()) > 1) return chosen;
  return why(`1 thread: ${chosen.threads} waited for cores that something else held when they were last used`);
}

/** The model's files in OPFS: fetched where the source is elsewhere, refused first where they cannot fit. */
async function fetched(
  store: ModelStore,
  { source, graph, context, asStored }: LoadRequest,
  choice: BuildChoice,
  report: Awaited<ReturnType<typeof probeDevice>>,
  signal: AbortSignal,
  emit: (event: LoadEvent) => void,
): Promise<StoredModel> {
  if (source.kind === "stored") {
    const stored = await store.get(source.id);
    if (stored?.complete) return stored;
    throw new NibbleError("not_found", `${source.id} is not stored whole in this browser; download it again.`);
  }
  const remote = await openRemote(source, signal);
  const selection = selectFiles(remote.files, choice, report, graph);
  const { files, sizeBytes, weightBytes } = selection;
  const before = await store.get(remote.id);
  const downloadBytes = Math.max(0, sizeBytes - (before?.storedBytes ?? 0));
  const kvBytes = kvBytesOf(await configOf(remote, signal), context ?? DEFAULT_CONTEXT);
  const twin = choice.device === "wasm" && !asStored && /_q\d/.test(selection.graph) && !before?.madeBytes;
  const tensorBytes = choice.device === "webgpu" ? await largestTensor(remote, selection, signal) : 0;
  checkFit({ downloadBytes, weightBytes, kvBytes, tensorBytes, twin }, choice, report);
  return store.download(remote, files, { signal, onProgress: (progress) => emit({ stage: "download", progress }) });
}

/** A graph with its weights beside it is smaller than this; one that holds them tells nothing before it is here. */
const GRAPH_BYTES = 16 * 2 ** 20;

/** Bytes of the largest tensor beside a graph. */
async function largestTensor(remote: RemoteModel, { graph, files }: Selection, signal: AbortSignal): Promise<number> {
  if (files.find(({ path }) => path === graph)!.sizeBytes > GRAPH_BYTES) return 0;
  const { body } = await remote.open(graph, 0, signal);
  const { initializer } = decodeModel(new Uint8Array(await new Response(body).arrayBuffer())).graph;
  const sizes = initializer.flatMap(({ externalData = [] }) =>
    externalData.filter(({ key }) => key === "length").map(({ value }) => Number(value)),
  );
  return Math.max(0, ...sizes);
}

/** A model's config.json, or {} where there is none: the opening says so. */
async function configOf(remote: RemoteModel, signal: AbortSignal): Promise<Readonly<Record<string, unknown>>> {
  if (!remote.files.some(({ path }) => path === "config.json")) return {};
  const { body } = await remote.open("config.json", 0, signal);
  return new Response(body).json().catch(() => ({}));
}

type OpenFolder = Awaited<ReturnType<ModelStore["folder"]>>;

async function sized(folder: OpenFolder, path: string): Promise<RemoteFile> {
  return { path, sizeBytes: (await folder.blob(path)).size };
}
