/**
 * A stand-in for the Hugging Face hub: the parts of its protocol that downloads use, as the real one answers them.
 * Large files are redirected to a second server (the CDN), which takes ranges and must not see the token.
 */
import { createHash } from "node:crypto";
import { createServer, type IncomingMessage, type Server, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

export interface StandInFile {
  readonly bytes: Uint8Array;
  /** Stored with LFS: hashed with SHA-256, served by the CDN. */
  readonly lfs?: boolean;
}

export interface Request {
  readonly server: "hub" | "cdn";
  readonly path: string;
  readonly range: string | undefined;
  readonly authorization: string | undefined;
}

/** What goes wrong, and how often. */
export interface Faults {
  /** CDN: the connection ends after this many bytes of the body. */
  cutAfter?: number;
  cuts?: number;
  /** CDN: bytes are changed on the way. */
  corrupt?: boolean;
  /** Hub: this many answers of 503. */
  busy?: number;
  /** Hub: only with this token; gated says why. */
  token?: string;
  gated?: boolean;
  /** CDN: ranges are ignored. */
  noRanges?: boolean;
}

export const COMMIT = "0123456789abcdef0123456789abcdef01234567";

export const sha256 = (bytes: Uint8Array): string => createHash("sha256").update(bytes).digest("hex");
/** git's name of a file's content. */
export const gitSha1 = (bytes: Uint8Array): string =>
  createHash("sha1").update(`blob ${bytes.length}\0`).update(bytes).digest("hex");

export class HubStandIn {
  readonly requests: Request[] = [];
  faults: Faults = {};

  private constructor(
    private readonly id: string,
    readonly files: Record<string, StandInFile>,
    private readonly hub: Server,
    private readonly cdn: Server,
  ) {}

  static async start(id: string, files: Record<string, StandInFile>): Promise<HubStandIn> {
    const [hub, cdn] = [createServer(), createServer()];
    const standIn = new HubStandIn(id, files, hub, cdn);
    hub.on("request", (request, response) => standIn.answer("hub", request, response));
    cdn.on("request", (request, response) => standIn.answer("cdn", request, response));
    await Promise.all([hub, cdn].map((server) => new Promise<void>((done) => server.listen(0, "127.0.0.1", done))));
    return standIn;
  }

  get url(): string {
    return `http://127.0.0.1:${(this.hub.address() as AddressInfo).port}`;
  }

  /** Paths that were downloaded, with their ranges. */
  get downloads(): string[] {
    return this.requests
      .filter(({ server, path }) => server === "cdn" || path.includes("/resolve/"))
      .filter(({ server, path }) => server === "cdn" || !this.files[path.replace(/^.*\/resolve\/[^/]+\//, "")]?.lfs)
      .map(({ path, range }) => path.replace(/^.*\/(resolve\/[^/]+|cdn)\//, "") + (range ? ` ${range}` : ""));
  }

  async stop(): Promise<void> {
    for (const server of [this.hub, this.cdn]) {
      server.closeAllConnections();
      await new Promise((done) => server.close(done));
    }
  }

  private answer(server: "hub" | "cdn", request: IncomingMessage, response: ServerResponse): void {
    const url = new URL(request.url!, this.url);
    const path = decodeURIComponent(url.pathname);
    const { range, authorization } = request.headers;
    this.requests.push({ server, path, range, authorization });
    if (server === "cdn") this.sendLarge(path.replace("/cdn/", ""), range, response);
    else this.sendFromHub(url, path, authorization, response);
  }

  private sendFromHub(url: URL, path: string, authorization: string | undefined, response: ServerResponse): unknown {
    if (this.faults.busy) {
      this.faults.busy--;
      return response.writeHead(503).end("try later");
    }
    if (this.faults.token && authorization !== `Bearer ${this.faults.token}`) {
      const code = this.faults.gated ? "GatedRepo" : "RepoNotFound";
      return refuse(response, this.faults.gated ? 403 : 401, code);
    }
    if (path.startsWith(`/api/models/${this.id}/revision/`)) {
      const revision = path.split("/revision/")[1];
      if (revision !== "main" && revision !== COMMIT) return refuse(response, 404, "RevisionNotFound");
      return json(response, {
        _id: "1",
        id: this.id,
        sha: COMMIT,
        siblings: Object.keys(this.files).map((rfilename) => ({ rfilename })),
        private: false,
        gated: false,
        downloads: 0,
        likes: 0,
        lastModified: "2026-01-01T00:00:00.000Z",
      });
    }
    if (path.startsWith(`/api/models/${this.id}/tree/${COMMIT}`)) return this.sendTree(url, response);
    if (path.startsWith(`/${this.id}/resolve/${COMMIT}/`))
      return this.sendSmall(path.split(`/${COMMIT}/`)[1], response);
    return refuse(response, 401, "RepoNotFound"); // the hub does not say whether a repository exists
  }

  /** Two entries a page, as `Link: <...>; rel="next"` says. */
  private sendTree(url: URL, response: ServerResponse): void {
    const cursor = Number(url.searchParams.get("cursor") ?? 0);
    const folder = url.pathname.split(`/tree/${COMMIT}`)[1].replace(/^\//, "");
    const entries = Object.entries(this.files)
      .filter(([path]) => path.slice(0, Math.max(0, path.lastIndexOf("/"))) === folder || path.startsWith(".."))
      .map(([path, { bytes, lfs }]) => ({
        type: "file",
        oid: lfs ? gitSha1(new TextEncoder().encode(`pointer of ${path}`)) : gitSha1(bytes),
        size: bytes.length,
        path,
        ...(lfs ? { lfs: { oid: sha256(bytes), size: bytes.length, pointerSize: 134 } } : {}),
      }));
    const next = new URL(url);
    next.searchParams.set("cursor", String(cursor + 2));
    if (cursor + 2 < entries.length) response.setHeader("Link", `<${next}>; rel="next"`);
    json(response, entries.slice(cursor, cursor + 2));
  }

  private sendSmall(path: string, response: ServerResponse): unknown {
    const file = this.files[path];
    if (!file) return refuse(response, 404, "EntryNotFound");
    response.setHeader("X-Repo-Commit", COMMIT);
    if (!file.lfs) {
      return response
        .writeHead(200, { ETag: `"${gitSha1(file.bytes)}"`, "Content-Length": file.bytes.length })
        .end(file.bytes);
    }
    const { port } = this.cdn.address() as AddressInfo;
    return response
      .writeHead(302, {
        Location: `http://127.0.0.1:${port}/cdn/${path}`,
        "X-Linked-Etag": `"${sha256(file.bytes)}"`,
        "X-Linked-Size": file.bytes.length,
      })
      .end();
  }

  private sendLarge(path: string, range: string | undefined, response: ServerResponse): void {
    const whole = this.files[path].bytes;
    const start = range && !this.faults.noRanges ? Number(/^bytes=(\d+)-/.exec(range)?.[1]) : 0;
    const bytes = whole.slice(start);
    if (this.faults.corrupt) bytes[bytes.length - 1] ^= 1;
    response.setHeader("Content-Length", bytes.length);
    if (start > 0) response.setHeader("Content-Range", `bytes ${start}-${whole.length - 1}/${whole.length}`);
    response.writeHead(start > 0 ? 206 : 200);
    if (this.faults.cuts && this.faults.cutAfter !== undefined) {
      this.faults.cuts--;
      response.write(bytes.subarray(0, this.faults.cutAfter), () => setTimeout(() => response.destroy(), 20));
      return;
    }
    response.end(bytes);
  }
}

function json(response: ServerResponse, value: unknown): void {
  response.writeHead(200, { "Content-Type": "application/json" }).end(JSON.stringify(value));
}

function refuse(response: ServerResponse, status: number, code: string): void {
  response.writeHead(status, { "X-Error-Code": code, "X-Error-Message": code, "Content-Type": "application/json" });
  response.end(JSON.stringify({ error: code }));
}
