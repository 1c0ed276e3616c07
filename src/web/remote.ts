/**
 * A model folder somewhere else (a URL, a hub id, files the user dropped) as a list of files with sizes and hashes, each
 * readable from any offset. Nothing here stores bytes: `store.ts` does.
 */
import { NibbleError } from "../errors.ts";
import { fileListFolder } from "./dropped.ts";

export interface RemoteFile {
  readonly path: string;
  readonly sizeBytes: number;
  /** `sizeBytes` is a guess: hosts compress JSON on the way and state the size of that. */
  readonly estimated?: true;
  /** Lower-case hex, where the folder's nibble.json or the hub states it. */
  readonly sha256?: string;
}

export interface OpenedFile {
  readonly body: ReadableStream<Uint8Array>;
  /** Where `body` starts: the offset asked for, or 0 from a server that does not know Range. */
  readonly offset: number;
  /** Identifies the bytes; a resumed file with another tag starts over. */
  readonly etag: string | undefined;
}

export interface RemoteModel {
  /** What it is stored and listed as. */
  readonly id: string;
  readonly origin: string;
  readonly files: readonly RemoteFile[];
  open(path: string, offset: number, signal?: AbortSignal): Promise<OpenedFile>;
}

export type ModelSource =
  | { readonly kind: "url"; readonly url: string }
  | { readonly kind: "hub"; readonly id: string; readonly revision?: string; readonly endpoint?: string }
  | { readonly kind: "files"; readonly name: string; readonly files: ReadonlyMap<string, Blob> };

const HUB = "https://huggingface.co";

/** "org/name[@revision]" is a hub id, anything with a scheme or a leading "." or "/" a URL. */
export function parseSource(text: string): ModelSource {
  const trimmed = text.trim();
  if (/^[a-z]+:\/\//i.test(trimmed) || /^\.{0,2}\//.test(trimmed)) return { kind: "url", url: trimmed };
  const hub = /^([\w.-]+\/[\w.-]+)(?:@([\w./-]+))?$/.exec(trimmed);
  if (hub) return { kind: "hub", id: hub[1], revision: hub[2] };
  throw new NibbleError(
    "bad_option",
    `"${text}" is no model: give a URL of a folder ("https://host/model/") or a hub id ("org/name" or "org/name@revision").`,
    { param: "model" },
  );
}

/** The files of a source and how to read them. */
export function openRemote(source: ModelSource, signal?: AbortSignal): Promise<RemoteModel> {
  if (source.kind === "hub") return openHub(source, signal);
  if (source.kind === "url") return openUrl(source.url, signal);
  return openFiles(source.name, source.files);
}

async function get(url: string, init: RequestInit = {}): Promise<Response> {
  let response: Response;
  try {
    response = await fetch(url, init);
  } catch (cause) {
    if (init.signal?.aborted) throw new NibbleError("aborted", "The download was stopped.", { cause });
    const message = `${url} could not be reached: offline, or the host allows no requests from this page (CORS).`;
    throw new NibbleError("network", message, { cause });
  }
  if (response.ok) return response;
  await response.body?.cancel();
  if (response.status === 404) throw new NibbleError("not_found", `${url} is not there (404).`);
  if (response.status === 401 || response.status === 403) {
    throw new NibbleError("network", `${url} may not be read (${response.status}): the model is private or gated.`);
  }
  throw new NibbleError("network", `${url} answered ${response.status} ${response.statusText}.`);
}

async function openHttp(url: string, offset: number, signal?: AbortSignal): Promise<OpenedFile> {
  // A plain Range needs no CORS preflight and If-Range does, so tags are compared by the caller.
  const headers: HeadersInit = offset > 0 ? { Range: `bytes=${offset}-` } : {};
  const response = await get(url, { headers, signal });
  if (!response.body) throw new NibbleError("network", `${url} answered without a body.`);
  let start = 0;
  if (response.status === 206) {
    const range = /^bytes (\d+)-/.exec(response.headers.get("content-range") ?? "");
    start = range ? Number(range[1]) : offset; // not exposed across origins: what was asked for
  }
  return { body: response.body, offset: start, etag: response.headers.get("etag") ?? undefined };
}

/** What nibble.json says about the files beside it. */
interface FolderManifest {
  readonly files: Readonly<Record<string, { readonly sizeBytes: number; readonly sha256: string }>>;
}

function manifestFiles(text: string, where: string): RemoteFile[] {
  let manifest: FolderManifest;
  try {
    manifest = JSON.parse(text) as FolderManifest;
  } catch (cause) {
    throw new NibbleError("bad_file", `${where} is not JSON.`, { cause });
  }
  return Object.entries(manifest.files ?? {}).map(([path, { sizeBytes, sha256 }]) => {
    if (!Number.isSafeInteger(sizeBytes) || sizeBytes < 0 || !/^[0-9a-f]{64}$/.test(sha256)) {
      throw new NibbleError("bad_file", `${where}: ${path} has no valid sizeBytes and sha256.`);
    }
    if (path.startsWith("/") || path.split("/").includes("..")) {
      throw new NibbleError("bad_file", `${where}: ${path} leads out of the folder.`);
    }
    return { path, sizeBytes, sha256 };
  });
}

async function openUrl(url: string, signal?: AbortSignal): Promise<RemoteModel> {
  const base = new URL(url.endsWith("/") ? url : `${url}/`, globalThis.location?.href);
  const at = (path: string) => new URL(path.split("/").map(encodeURIComponent).join("/"), base).href;
  const response = await get(at("nibble.json"), { signal, cache: "no-cache" }).catch((error: NibbleError) => {
    if (error.code === "not_found") return undefined;
    throw error;
  });
  const text = await response?.text();
  const isJson = text?.trimStart().startsWith("{"); // hosts of single-page apps answer any path with their index.html
  const files = isJson
    ? [
        ...manifestFiles(text!, at("nibble.json")),
        { path: "nibble.json", sizeBytes: new TextEncoder().encode(text).byteLength },
      ]
    : await probeTransformersFolder(at, signal);
  const name = decodeURIComponent(base.pathname.split("/").filter(Boolean).at(-1) ?? base.host);
  return { id: name, origin: base.href, files, open: (path, offset, stop) => openHttp(at(path), offset, stop) };
}

/** Graphs a transformers.js folder may hold, in the order we try them. */
const TRANSFORMERS_GRAPHS = ["model_q4", "model_q4f16", "model_quantized", "model"];

interface TransformersConfig {
  readonly "transformers.js_config"?: {
    readonly use_external_data_format?: boolean | number | Readonly<Record<string, boolean | number>>;
  };
}

/** A folder without nibble.json: its files are asked for by the names that transformers.js uses. */
async function probeTransformersFolder(at: (path: string) => string, signal?: AbortSignal): Promise<RemoteFile[]> {
  const size = async (path: string): Promise<RemoteFile | undefined> => {
    try {
      const response = await get(at(path), { method: "HEAD", signal });
      if (response.headers.get("content-type")?.startsWith("text/html")) return undefined;
      const sizeBytes = Number(response.headers.get("content-length") ?? 0);
      return path.includes("/") ? { path, sizeBytes } : { path, sizeBytes, estimated: true };
    } catch (error) {
      if ((error as NibbleError).code === "not_found") return undefined;
      throw error;
    }
  };
  const config = (await get(at("config.json"), { signal }).then((answer) => answer.json())) as TransformersConfig;
  const side = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"];
  const files = (await Promise.all([...side, "chat_template.jinja"].map(size))).filter((file) => file !== undefined);
  for (const graph of TRANSFORMERS_GRAPHS) {
    const file = await size(`onnx/${graph}.onnx`);
    if (!file) continue;
    const format = config["transformers.js_config"]?.use_external_data_format ?? false;
    const chunks = Number(typeof format === "object" ? (format[`${graph}.onnx`] ?? 0) : format);
    const names = Array.from({ length: chunks }, (_, i) => `onnx/${graph}.onnx_data${i === 0 ? "" : `_${i}`}`);
    const data = (await Promise.all(names.map(size))).filter((part) => part !== undefined);
    return [...files, file, ...data];
  }
  throw new NibbleError(
    "not_found",
    `${at("")} holds neither nibble.json nor one of ${TRANSFORMERS_GRAPHS.map((name) => `onnx/${name}.onnx`).join(", ")}.`,
  );
}

interface HubEntry {
  readonly type: "file" | "directory";
  readonly path: string;
  readonly size: number;
  readonly lfs?: { readonly oid: string; readonly size: number };
}

async function openHub(source: ModelSource & { kind: "hub" }, signal?: AbortSignal): Promise<RemoteModel> {
  const { id, revision = "main", endpoint = HUB } = source;
  const tree = `${endpoint}/api/models/${id}/tree/${encodeURIComponent(revision)}?recursive=true`;
  const entries = (await get(tree, { signal }).then((answer) => answer.json())) as HubEntry[];
  const at = (path: string) =>
    `${endpoint}/${id}/resolve/${encodeURIComponent(revision)}/${path.split("/").map(encodeURIComponent).join("/")}`;
  const files = new Map<string, RemoteFile>();
  for (const { type, path, size, lfs } of entries) {
    if (type === "file") files.set(path, { path, sizeBytes: lfs?.size ?? size, sha256: lfs?.oid });
  }
  if (files.has("nibble.json")) {
    const text = await get(at("nibble.json"), { signal }).then((answer) => answer.text());
    for (const file of manifestFiles(text, at("nibble.json"))) files.set(file.path, file);
  }
  return {
    id: revision === "main" ? id : `${id}@${revision}`,
    origin: `${endpoint}/${id}`,
    files: [...files.values()],
    open: (path, offset, stop) => openHttp(at(path), offset, stop),
  };
}

async function openFiles(name: string, files: ReadonlyMap<string, Blob>): Promise<RemoteModel> {
  const manifest = files.get("nibble.json");
  const hashes = new Map<string, RemoteFile>();
  if (manifest) {
    for (const file of manifestFiles(await manifest.text(), `${name}/nibble.json`)) hashes.set(file.path, file);
  }
  const listed = Array.from(files, ([path, { size }]) => ({ path, sizeBytes: size, sha256: hashes.get(path)?.sha256 }));
  return {
    id: name,
    origin: "a folder of this computer",
    files: listed,
    async open(path, offset) {
      const file = files.get(path);
      if (!file) throw new NibbleError("not_found", `${name}: there is no ${path}.`);
      return { body: file.slice(offset).stream(), offset, etag: undefined };
    },
  };
}

/** The files of a folder input as a source. */
export function filesSource(files: Iterable<File>): ModelSource {
  return { kind: "files", ...fileListFolder(files) };
}
