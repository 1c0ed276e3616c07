/**
 * ONNX Runtime's C API over koffi, on the very library that onnxruntime-node ships. Against that package's own binding:
 * outputs are written where the caller wants them, never copied (a copy of the whole KV cache per token otherwise).
 * Implements as much of onnxruntime-common's InferenceSession as the runtime uses.
 *
 * A run is on the thread that asks for it, which is a worker's. On another one it costs a token 0.4 ms and, where two
 * threads meet on one core, now and then the 3 to 10 ms until the system moves one: 15 to 20 % of SmolLM2's tokens a
 * second on two cores, more than masks computed beside it save.
 */
import { existsSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import type { InferenceSession, Tensor } from "onnxruntime-common";
import { Tensor as CommonTensor } from "onnxruntime-common";
import { NibbleError } from "../errors.ts";
import type { MemoryFile } from "../onnx/fold-constants.ts";
import { type Lent, type Ort, type SessionOptions, typedArray } from "../onnx/ort.ts";
import { decodeModel, type ValueInfoProto } from "../onnx/proto.ts";

type Koffi = typeof import("koffi");
/** koffi 3 hands pointers out as BigInt. */
type Pointer = bigint;
type Status = Pointer | null;

/** OrtApi is a table of functions whose order never changes; these are their places (onnxruntime_c_api.h). */
const PLACE = {
  GetErrorMessage: 2,
  CreateEnv: 3,
  CreateSession: 7,
  CreateSessionFromArray: 8,
  Run: 9,
  CreateSessionOptions: 10,
  SetSessionLogSeverityLevel: 22,
  SetSessionGraphOptimizationLevel: 23,
  SetIntraOpNumThreads: 24,
  CreateTensorWithDataAsOrtValue: 49,
  GetTensorMutableData: 51,
  GetTensorElementType: 60,
  GetDimensionsCount: 61,
  GetDimensions: 62,
  GetTensorTypeAndShape: 65,
  CreateCpuMemoryInfo: 69,
  ReleaseStatus: 93,
  ReleaseSession: 95,
  ReleaseValue: 96,
  ReleaseTensorTypeAndShapeInfo: 99,
  ReleaseSessionOptions: 100,
  AddSessionConfigEntry: 130,
  AddExternalInitializers: 210,
  AddExternalInitializersFromFilesInMemory: 279,
} as const;
/** The lowest version of the table that has all of these; a newer library still serves it. */
const API_VERSION = 18;
const LOG_ERROR = 3;
const OPTIMIZE_ALL = 99;
const ARENA_ALLOCATOR = 1;
const DEFAULT_MEMORY = 0;

/** ONNXTensorElementDataType */
const TYPE_CODE: Readonly<Partial<Record<Tensor.Type, number>>> = {
  float32: 1,
  uint8: 2,
  int8: 3,
  int32: 6,
  int64: 7,
  bool: 9,
  float16: 10,
  float64: 11,
};
const TYPE_NAME = new Map(Object.entries(TYPE_CODE).map(([name, code]) => [code, name as Tensor.Type]));

/** libonnxruntime inside the installed onnxruntime-node. */
export function libraryPath(): string {
  const main = createRequire(import.meta.url).resolve("onnxruntime-node");
  const folder = join(dirname(main), "..", "bin", "napi-v6", process.platform, process.arch);
  const names: Partial<Record<NodeJS.Platform, readonly string[]>> = {
    darwin: ["libonnxruntime.1.30.0.dylib", "libonnxruntime.1.dylib", "libonnxruntime.dylib"],
    win32: ["onnxruntime.dll"],
  };
  const candidates = names[process.platform] ?? ["libonnxruntime.so.1"];
  const found = candidates.map((name) => join(folder, name)).find(existsSync);
  if (found) return found;
  throw new NibbleError(
    "unsupported",
    `onnxruntime-node has no library for ${process.platform}-${process.arch} in ${folder}.`,
  );
}

interface Api {
  readonly koffi: Koffi;
  /** Held on to: koffi unloads a library whose handle is collected, whoever still calls into it. */
  readonly library: unknown;
  readonly call: Readonly<Record<keyof typeof PLACE, ((...args: unknown[]) => Status) & { async: AsyncCall }>>;
  readonly env: Pointer;
  readonly memory: Pointer;
}

type AsyncCall = (...args: unknown[]) => void;

let opened: Promise<Api> | undefined;

/** Opens library and function table, once per thread; errors: `unsupported` where koffi is not installed. */
function openApi(): Promise<Api> {
  opened ??= loadApi();
  return opened;
}

async function loadApi(): Promise<Api> {
  let koffi: Koffi;
  try {
    koffi = (await import("koffi")).default as unknown as Koffi;
  } catch (cause) {
    throw new NibbleError(
      "unsupported",
      "The fast binding needs the optional dependency koffi, which is not installed.",
      {
        cause,
      },
    );
  }
  const library = koffi.load(libraryPath());
  const getBase = library.func("OrtGetApiBase", "void *", []);
  const base = getBase() as Pointer;
  const getApi = koffi.decode(koffi.decode(base, "void *"), koffi.proto("void *(uint32_t)")) as (v: number) => Pointer;
  const table = getApi(API_VERSION);
  if (!table)
    throw new NibbleError("unsupported", `${libraryPath()} does not serve version ${API_VERSION} of its C API.`);
  const path = process.platform === "win32" ? "str16" : "str";
  const signatures: Readonly<Record<keyof typeof PLACE, string>> = {
    GetErrorMessage: "str (void *)",
    CreateEnv: "void *(int, str, _Out_ void **)",
    CreateSession: `void *(void *, ${path}, void *, _Out_ void **)`,
    Run: "void *(void *, void *, void *, void *, size_t, void *, size_t, void *)",
    CreateSessionFromArray: "void *(void *, void *, size_t, void *, _Out_ void **)",
    CreateSessionOptions: "void *(_Out_ void **)",
    SetSessionLogSeverityLevel: "void *(void *, int)",
    SetSessionGraphOptimizationLevel: "void *(void *, int)",
    SetIntraOpNumThreads: "void *(void *, int)",
    CreateTensorWithDataAsOrtValue: "void *(void *, void *, size_t, void *, size_t, int, _Out_ void **)",
    GetTensorMutableData: "void *(void *, _Out_ void **)",
    GetTensorElementType: "void *(void *, _Out_ int *)",
    GetDimensionsCount: "void *(void *, _Out_ size_t *)",
    GetDimensions: "void *(void *, void *, size_t)",
    GetTensorTypeAndShape: "void *(void *, _Out_ void **)",
    CreateCpuMemoryInfo: "void *(int, int, _Out_ void **)",
    ReleaseStatus: "void (void *)",
    ReleaseSession: "void (void *)",
    ReleaseValue: "void (void *)",
    ReleaseTensorTypeAndShapeInfo: "void (void *)",
    ReleaseSessionOptions: "void (void *)",
    AddSessionConfigEntry: "void *(void *, str, str)",
    AddExternalInitializers: "void *(void *, void *, void *, size_t)",
    AddExternalInitializersFromFilesInMemory: "void *(void *, void *, void *, void *, size_t)",
  };
  const pointerSize = 8;
  const call = Object.fromEntries(
    Object.entries(PLACE).map(([name, place]) => {
      const address = koffi.decode(table, place * pointerSize, "void *") as Pointer;
      return [name, koffi.decode(address, koffi.proto(signatures[name as keyof typeof PLACE]))];
    }),
  ) as Api["call"];
  const api = { koffi, library, call } as { -readonly [K in keyof Api]: Api[K] };
  api.env = out(api, (slot) => call.CreateEnv(LOG_ERROR, "nibble", slot));
  api.memory = out(api, (slot) => call.CreateCpuMemoryInfo(ARENA_ALLOCATOR, DEFAULT_MEMORY, slot));
  return api;
}

const held: unknown[] = [];

/** Keeps the library loaded for as long as the process lives, though workers that use it come and go. */
export async function holdLibrary(): Promise<void> {
  if (held.length === 0) held.push((await import("koffi")).default.load(libraryPath()));
}

/** Throws what a status says and frees it. */
function check({ call }: Pick<Api, "call">, status: Status): void {
  if (!status) return;
  const message = (call.GetErrorMessage as unknown as (status: Status) => string)(status);
  call.ReleaseStatus(status);
  throw new Error(message);
}

/** The value that a function leaves in its last parameter. */
function out<T = Pointer>(api: Pick<Api, "call">, run: (slot: [T | null]) => Status): T {
  const slot: [T | null] = [null];
  check(api, run(slot));
  return slot[0] as T;
}

export async function capiOrt(): Promise<Ort> {
  const api = await openApi();
  const create = async (model: string | Uint8Array, options?: SessionOptions) =>
    openCapiSession(api, model, options) as unknown as InferenceSession;
  return { lends: true, InferenceSession: { create }, Tensor: CommonTensor as unknown as Ort["Tensor"] };
}

/** onnxruntime-node's nested objects, { session: { a: "1" } }, as the library's own keys, session.a. */
function configEntries(extra: object, prefix = ""): [string, string][] {
  return Object.entries(extra).flatMap(([key, value]) =>
    typeof value === "object" ? configEntries(value, `${prefix}${key}.`) : [[`${prefix}${key}`, String(value)]],
  );
}

async function openCapiSession(
  api: Api,
  model: string | Uint8Array,
  { intraOpNumThreads, extra, externalData, lent = {} }: SessionOptions = {},
): Promise<CapiSession> {
  const { call } = api;
  const options = out(api, (slot) => call.CreateSessionOptions(slot));
  try {
    check(api, call.SetSessionLogSeverityLevel(options, LOG_ERROR));
    check(api, call.SetSessionGraphOptimizationLevel(options, OPTIMIZE_ALL));
    if (intraOpNumThreads !== undefined) check(api, call.SetIntraOpNumThreads(options, intraOpNumThreads));
    for (const [key, value] of configEntries(extra ?? {})) {
      check(api, call.AddSessionConfigEntry(options, key, value));
    }
    // both are read until the session stands, and copied by then
    const files = externalData && memoryFiles(api.koffi, externalData as readonly MemoryFile[]);
    if (files) check(api, call.AddExternalInitializersFromFilesInMemory(options, ...files.parameters));
    lend(api, options, lent);
    const slot: [Pointer | null] = [null];
    const status = await new Promise<Status>((resolve, reject) => {
      const done = (error: unknown, result: Status) => (error ? reject(error) : resolve(result));
      if (typeof model === "string") call.CreateSession.async(api.env, model, options, slot, done);
      else {
        const address = api.koffi.address(model);
        call.CreateSessionFromArray.async(api.env, address, model.byteLength, options, slot, done);
      }
    });
    check(api, status);
    if (files) files.held.length = 0; // until here, whatever the collector thinks
    return new CapiSession(api, slot[0] as Pointer, typeof model === "string" ? readFileSync(model) : model, lent);
  } finally {
    call.ReleaseSessionOptions(options);
  }
}

/**
 * An array of pointers at a known address, which koffi takes as it is. The memory is V8's (64 bytes or more: outside its
 * moving heap).
 */
class PointerTable {
  readonly entries: BigUint64Array;
  readonly address: Pointer;

  constructor(koffi: Koffi, length: number) {
    this.entries = new BigUint64Array(Math.max(8, length));
    this.address = koffi.address(this.entries);
  }
}

/**
 * Files in memory as AddExternalInitializersFromFilesInMemory takes them: names, buffers, lengths, count; and what has to
 * stay alive as long as the library reads them.
 */
function memoryFiles(koffi: Koffi, files: readonly MemoryFile[]): { parameters: unknown[]; held: unknown[] } {
  const [names, buffers, lengths] = ["names", "buffers", "lengths"].map(() => new PointerTable(koffi, files.length));
  // a path is of wide characters on Windows; Buffers of 64 bytes and more lie outside V8's moving heap
  const encoding = process.platform === "win32" ? "utf16le" : "utf8";
  const paths = files.map(({ path }) => Buffer.concat([Buffer.from(`${path}\0`, encoding), Buffer.alloc(64)]));
  for (const [i, { data }] of files.entries()) {
    names.entries[i] = koffi.address(paths[i]);
    buffers.entries[i] = koffi.address(data);
    lengths.entries[i] = BigInt(data.byteLength);
  }
  return {
    parameters: [names.address, buffers.address, lengths.address, files.length],
    held: [names, buffers, lengths, paths, files],
  };
}

function lend(api: Api, options: Pointer, lent: Lent): void {
  const names = Object.keys(lent);
  if (names.length === 0) return;
  const native = new NativeNames(api.koffi, names);
  const [places, values] = [new PointerTable(api.koffi, names.length), new PointerTable(api.koffi, names.length)];
  try {
    for (const [i, name] of names.entries()) {
      places.entries[i] = native.address(name);
      values.entries[i] = createValue(api, lent[name]);
    }
    check(api, api.call.AddExternalInitializers(options, places.address, values.address, names.length));
  } finally {
    for (const value of values.entries) if (value) api.call.ReleaseValue(value); // options have their own reference
  }
}

/** Null-terminated copies of names. */
class NativeNames {
  private readonly addresses = new Map<string, Pointer>();
  private readonly bytes: Uint8Array;

  constructor(koffi: Koffi, names: readonly string[]) {
    const encoded = names.map((name) => new TextEncoder().encode(`${name}\0`));
    this.bytes = new Uint8Array(encoded.reduce((sum, { length }) => sum + length, 64));
    const start = koffi.address(this.bytes);
    let offset = 0;
    for (const [i, name] of names.entries()) {
      this.bytes.set(encoded[i], offset);
      this.addresses.set(name, start + BigInt(offset));
      offset += encoded[i].length;
    }
  }

  address(name: string): Pointer {
    const address = this.addresses.get(name);
    if (address === undefined) throw new NibbleError("engine", `The graph has no input or output ${name}.`);
    return address;
  }
}

type Feeds = Readonly<Record<string, Tensor>>;
type Fetches = Readonly<Record<string, Tensor | null>> | readonly string[];

class CapiSession {
  readonly inputNames: readonly string[];
  readonly outputNames: readonly string[];
  readonly inputMetadata: readonly InferenceSession.ValueMetadata[];
  readonly outputMetadata: readonly InferenceSession.ValueMetadata[];
  private readonly names: NativeNames;
  /** Arguments of Run: names and values of inputs, names and values of outputs. */
  private readonly tables: Readonly<Record<"inputNames" | "inputs" | "outputNames" | "outputs", PointerTable>>;
  /** Values of tensors that a caller hands in step after step; one that comes a second time is such a tensor. */
  private readonly bound = new WeakMap<Tensor, Pointer>();
  private readonly seen = new WeakSet<Tensor>();
  private readonly collected: FinalizationRegistry<Pointer>;
  private running: Promise<unknown> | undefined;
  private released = false;

  constructor(
    private readonly api: Api,
    private readonly session: Pointer,
    model: Uint8Array,
    /** Held for as long as the library may read them. */
    readonly lent: Lent,
  ) {
    // the graph file says the same as the library would, without twenty more functions
    const { graph } = decodeModel(model);
    const stored = new Set(graph.initializer.map(({ name }) => name));
    this.inputMetadata = graph.input.filter(({ name }) => !stored.has(name)).map(metadata);
    this.outputMetadata = graph.output.map(metadata);
    this.inputNames = this.inputMetadata.map(({ name }) => name);
    this.outputNames = this.outputMetadata.map(({ name }) => name);
    const { koffi, call } = api;
    this.collected = new FinalizationRegistry((value) => call.ReleaseValue(value));
    this.names = new NativeNames(koffi, [...this.inputNames, ...this.outputNames]);
    this.tables = {
      inputNames: new PointerTable(koffi, this.inputNames.length),
      inputs: new PointerTable(koffi, this.inputNames.length),
      outputNames: new PointerTable(koffi, this.outputNames.length),
      outputs: new PointerTable(koffi, this.outputNames.length),
    };
  }

  /** Outputs whose tensor is given are written there; the others come as new tensors. */
  run(feeds: Feeds, fetches: Fetches = this.outputNames): Promise<Record<string, Tensor>> {
    const wanted: Feeds | Record<string, null> = Array.isArray(fetches)
      ? Object.fromEntries(fetches.map((name: string) => [name, null]))
      : (fetches as Feeds);
    const run = async () => {
      try {
        return await this.runNow(feeds, wanted as Record<string, Tensor | null>);
      } finally {
        if (this.running === result) this.running = undefined;
      }
    };
    // one after the other: they share the tables
    const result: Promise<Record<string, Tensor>> = this.running?.then(run, run) ?? run();
    this.running = result;
    return result;
  }

  private async runNow(feeds: Feeds, fetches: Record<string, Tensor | null>): Promise<Record<string, Tensor>> {
    if (this.released) throw new NibbleError("engine", "The session was released.");
    const { api, session } = this;
    const { call } = api;
    const made: Pointer[] = [];
    const nativeValue = (tensor: Tensor): Pointer => {
      let value = this.bound.get(tensor);
      if (value !== undefined) return value;
      value = createValue(api, tensor);
      if (this.seen.has(tensor)) this.bind(tensor, value);
      else made.push(value);
      this.seen.add(tensor);
      return value;
    };
    const inputNames = Object.keys(feeds);
    const outputNames = Object.keys(fetches);
    const { tables } = this;
    const outputs = tables.outputs.entries;
    try {
      for (const [i, name] of inputNames.entries()) {
        tables.inputNames.entries[i] = this.names.address(name);
        tables.inputs.entries[i] = nativeValue(feeds[name]);
      }
      for (const [i, name] of outputNames.entries()) {
        tables.outputNames.entries[i] = this.names.address(name);
        outputs[i] = fetches[name] ? nativeValue(fetches[name]) : 0n; // 0: the library makes one
      }
      // after what waits on this thread: messages, and what the step before gave its readers
      await new Promise<void>((resolve) => setImmediate(resolve));
      const status = call.Run(
        session,
        null,
        tables.inputNames.address,
        tables.inputs.address,
        inputNames.length,
        tables.outputNames.address,
        outputNames.length,
        tables.outputs.address,
      );
      for (const [i, name] of outputNames.entries()) if (!fetches[name] && outputs[i]) made.push(outputs[i]);
      check(api, status);
      return Object.fromEntries(
        outputNames.map((name, i) => [name, fetches[name] ?? readValue(api, outputs[i])] as const),
      );
    } finally {
      for (const value of made) call.ReleaseValue(value);
    }
  }

  private bind(tensor: Tensor, value: Pointer): void {
    this.bound.set(tensor, value);
    this.collected.register(tensor, value);
  }

  async release(): Promise<void> {
    if (this.released) return;
    this.released = true;
    await this.running?.catch(() => undefined); // its caller knows
    this.api.call.ReleaseSession(this.session);
  }
}

/** A value on the tensor's own memory. */
function createValue(api: Api, { type, data, dims }: Tensor): Pointer {
  const shape = BigInt64Array.from(dims, BigInt);
  const bytes = data as Uint8Array;
  // an empty cache has no memory; the library wants an address all the same
  const memory = bytes.byteLength > 0 ? bytes : new Uint8Array(8);
  return out(api, (slot) =>
    api.call.CreateTensorWithDataAsOrtValue(
      api.memory,
      memory,
      bytes.byteLength,
      shape,
      dims.length,
      TYPE_CODE[type] ?? 0,
      slot,
    ),
  );
}

/** A tensor with a copy of what the library made. */
function readValue(api: Api, value: Pointer): Tensor {
  const { call, koffi } = api;
  const info = out(api, (slot) => call.GetTensorTypeAndShape(value, slot));
  try {
    const code = out<number>(api, (slot) => call.GetTensorElementType(info, slot));
    const rank = Number(out<number>(api, (slot) => call.GetDimensionsCount(info, slot)));
    const shape = new BigInt64Array(rank);
    check(api, call.GetDimensions(info, shape, rank));
    const dims = Array.from(shape, Number);
    const type = TYPE_NAME.get(code);
    if (!type) throw new NibbleError("unsupported", `An output of element type ${code}.`);
    const data = typedArray(
      type,
      dims.reduce((product, dim) => product * dim, 1),
    ) as Uint8Array;
    if (data.byteLength > 0) {
      // a copy: V8 does not survive views on memory that is freed and handed out again
      const memory = out(api, (slot) => call.GetTensorMutableData(value, slot));
      new Uint8Array(data.buffer).set(koffi.decode(memory, koffi.array("uint8_t", data.byteLength, "Typed")));
    }
    return new CommonTensor(type, data as never, dims) as Tensor;
  } finally {
    call.ReleaseTensorTypeAndShapeInfo(info);
  }
}

function metadata({ name, type }: ValueInfoProto): InferenceSession.ValueMetadata {
  const tensor = type?.tensorType;
  const dims = tensor?.shape?.dim ?? [];
  return {
    name,
    isTensor: true,
    type: TYPE_NAME.get(tensor?.elemType ?? 0) ?? "float32",
    shape: dims.map((dim) => (dim.dimParam ? dim.dimParam : Number(dim.dimValue ?? 0))),
  };
}
