import {
  existsSync,
  lstatSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { writeSafetensors } from "../../src/checkpoint/safetensors.ts";
import { memorySink } from "../../src/memory-files.ts";
import { downloadModel, parseHubId } from "../../src/node/hub.ts";
import { listModels } from "../../src/node/models.ts";
import { openCheckpoint } from "../../src/node/open-checkpoint.ts";
import type { Progress } from "../../src/progress.ts";
import { COMMIT, gitSha1, HubStandIn, sha256 } from "./hub-stand-in.ts";

const text = (value: unknown) => new TextEncoder().encode(typeof value === "string" ? value : JSON.stringify(value));

async function safetensors(name: string, count: number): Promise<Uint8Array> {
  const sink = memorySink("m");
  const bytes = () => new Uint8Array(Float32Array.from({ length: count }, (_, i) => i).buffer);
  await writeSafetensors(await sink.create("x"), [{ name, dtype: "f32", shape: [count], bytes }]);
  return sink.files.get("x")!;
}

const weights = await safetensors("w", 50_000); // 200 kB: several pieces on the wire
const config = text({ model_type: "llama" });
const ID = "org/tiny";

let folder: string;
let hub: HubStandIn;

async function serve(files: HubStandIn["files"]): Promise<HubStandIn> {
  hub = await HubStandIn.start(ID, files);
  vi.stubEnv("HF_ENDPOINT", `${hub.url}/`);
  return hub;
}

const usual = () =>
  serve({
    "config.json": { bytes: config },
    "tokenizer.json": { bytes: text("{}") },
    "model.safetensors": { bytes: weights, lfs: true },
    "pytorch_model.bin": { bytes: text("pickle"), lfs: true },
    "README.md": { bytes: text("# tiny") },
    "../../escaped.json": { bytes: text("evil") },
  });

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "nibble-hub-"));
  vi.stubEnv("HF_HOME", folder);
  vi.stubEnv("NIBBLE_CACHE", join(folder, "nibble"));
  for (const name of [
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
  ])
    vi.stubEnv(name, undefined);
});
afterEach(async () => {
  await hub?.stop();
  vi.unstubAllEnvs();
  rmSync(folder, { recursive: true });
});

const storage = () => join(folder, "hub", "models--org--tiny");
const blob = () => join(storage(), "blobs", sha256(weights));

describe("a download", () => {
  test("brings what is needed, in the layout of huggingface_hub, and says how far it is", async () => {
    await usual();
    const reports: Progress[] = [];
    const checkpoint = await openCheckpoint(ID, { onProgress: (progress) => reports.push(progress) });
    expect([...(await checkpoint.readTensor("w")).data.slice(0, 3)]).toEqual([0, 1, 2]);
    expect(checkpoint.name).toBe(ID);
    await checkpoint.dispose();

    expect(hub.downloads.sort()).toEqual(["config.json", "model.safetensors", "tokenizer.json"]);
    expect(readFileSync(join(storage(), "refs/main"), "utf8")).toBe(COMMIT);
    const link = join(storage(), "snapshots", COMMIT, "model.safetensors");
    expect(readlinkSync(link)).toBe(`../../blobs/${sha256(weights)}`);
    expect(lstatSync(join(storage(), "blobs", gitSha1(config))).isFile()).toBe(true);
    expect(existsSync(join(folder, "escaped.json"))).toBe(false);

    const total = config.length + 2 + weights.length;
    expect(reports.at(-1)).toEqual({ stage: "download model.safetensors", done: total, total, unit: "bytes" });
    const done = reports.map((report) => report.done);
    expect(done).toEqual([...done].sort((a, b) => a - b));
    expect(await listModels()).toMatchObject([{ kind: "downloaded", name: ID, sizeBytes: total }]);
  });

  test("does not happen twice, and works from the cache when the hub is gone or forbidden", async () => {
    await usual();
    await downloadModel(ID);
    hub.requests.length = 0;
    expect((await downloadModel(ID)).notes).toEqual([]);
    expect(hub.downloads).toEqual([]);

    vi.stubEnv("HF_HUB_OFFLINE", "1");
    hub.requests.length = 0;
    expect((await downloadModel(ID)).notes[0]).toMatch(/HF_HUB_OFFLINE is set.*copy in the cache/);
    expect(hub.requests).toEqual([]);
    await expect(downloadModel("org/other")).rejects.toMatchObject({ code: "network" });

    vi.stubEnv("HF_HUB_OFFLINE", undefined);
    await hub.stop();
    const { folder: snapshot, notes } = await downloadModel(ID);
    expect(snapshot).toBe(join(storage(), "snapshots", COMMIT));
    expect(notes[0]).toMatch(/could not be reached.*copy in the cache/);
    await expect(downloadModel("org/other")).rejects.toMatchObject({ code: "network" });
  }, 60_000);

  test("finds what Python tools downloaded", async () => {
    await usual();
    for (const [path, bytes, name] of [
      ["config.json", config, gitSha1(config)],
      ["model.safetensors", weights, sha256(weights)],
    ] as const) {
      for (const part of ["blobs", `snapshots/${COMMIT}`]) mkdirSync(join(storage(), part), { recursive: true });
      writeFileSync(join(storage(), "blobs", name), bytes);
      symlinkSync(`../../blobs/${name}`, join(storage(), "snapshots", COMMIT, path));
    }
    await downloadModel(`${ID}@${COMMIT}`);
    expect(hub.downloads).toEqual(["tokenizer.json"]);
  });

  test("of shards takes those that the index names", async () => {
    const weight_map = { a: "model-00001-of-00002.safetensors", b: "model-00002-of-00002.safetensors" };
    await serve({
      "config.json": { bytes: config },
      "model.safetensors.index.json": { bytes: text({ weight_map }) },
      "model-00001-of-00002.safetensors": { bytes: await safetensors("a", 3), lfs: true },
      "model-00002-of-00002.safetensors": { bytes: await safetensors("b", 3), lfs: true },
      "consolidated.safetensors": { bytes: await safetensors("c", 3), lfs: true },
    });
    const checkpoint = await openCheckpoint(ID);
    expect([...checkpoint.tensors.keys()]).toEqual(["a", "b"]);
    await checkpoint.dispose();
    expect(hub.downloads).not.toContain("consolidated.safetensors");
  });

  test("of a repository of GGUFs asks for one, and takes the one named", async () => {
    const bytes = text("GGUF");
    await serve({
      "tiny-q4.gguf": { bytes, lfs: true },
      "tiny-q8.gguf": { bytes, lfs: true },
      "big/x-00001-of-00002.gguf": { bytes, lfs: true },
      "big/x-00002-of-00002.gguf": { bytes, lfs: true },
    });
    await expect(downloadModel(ID)).rejects.toMatchObject({
      code: "bad_option",
      message: expect.stringMatching(/org\/tiny\/tiny-q4\.gguf: .*tiny-q8\.gguf \(4 B\)/),
    });
    expect((await downloadModel(`${ID}/tiny-q8.gguf`)).files).toEqual(["tiny-q8.gguf"]);
    expect((await downloadModel(`${ID}/big/x-00001-of-00002.gguf`)).files).toHaveLength(2);
    await expect(downloadModel(`${ID}/none.gguf`)).rejects.toMatchObject({ code: "not_found" });
  });

  test("of a repository of pickles is refused", async () => {
    await serve({ "config.json": { bytes: config }, "pytorch_model.bin": { bytes: text("pickle"), lfs: true } });
    await expect(downloadModel(ID)).rejects.toMatchObject({
      code: "unsupported",
      message: expect.stringMatching(/pickle/),
    });
  });
});

describe("an interrupted download", () => {
  test("goes on where the connection broke", async () => {
    await usual();
    hub.faults = { cutAfter: 70_000, cuts: 2 };
    await downloadModel(ID);
    expect(sha256(readFileSync(blob()))).toBe(sha256(weights));
    expect(hub.downloads.slice(-3)).toEqual([
      "model.safetensors",
      "model.safetensors bytes=70000-",
      "model.safetensors bytes=140000-",
    ]);
    expect(existsSync(`${blob()}.incomplete`)).toBe(false);
  });

  test("goes on however often it breaks, as long as something comes", async () => {
    await usual();
    hub.faults = { cutAfter: 20_000, cuts: 8 };
    await downloadModel(ID);
    expect(sha256(readFileSync(blob()))).toBe(sha256(weights));
  }, 30_000);

  test("goes on in another run, and can be cancelled", async () => {
    await usual();
    const abort = new AbortController();
    const cancelled = downloadModel(ID, {
      signal: abort.signal,
      onProgress: ({ stage, done }) => stage.endsWith("model.safetensors") && done > 60_000 && abort.abort(),
    });
    await expect(cancelled).rejects.toMatchObject({ code: "aborted" });
    const have = lstatSync(`${blob()}.incomplete`).size;
    expect(have).toBeGreaterThan(0);
    hub.requests.length = 0;
    await downloadModel(ID);
    expect(hub.downloads).toEqual([`model.safetensors bytes=${have}-`]);
    expect(sha256(readFileSync(blob()))).toBe(sha256(weights));
  });

  test("starts again where the server knows no ranges, or the piece on disk is another's", async () => {
    await usual();
    mkdirSync(join(storage(), "blobs"), { recursive: true });
    writeFileSync(`${blob()}.incomplete`, weights.slice(0, 100));
    hub.faults = { noRanges: true };
    await downloadModel(ID);
    expect(sha256(readFileSync(blob()))).toBe(sha256(weights));

    rmSync(storage(), { recursive: true });
    mkdirSync(join(storage(), "blobs"), { recursive: true });
    writeFileSync(`${blob()}.incomplete`, new Uint8Array(100));
    hub.faults = {};
    await downloadModel(ID);
    expect(sha256(readFileSync(blob()))).toBe(sha256(weights));
  });

  test("with wrong bytes in the end is thrown away", async () => {
    await usual();
    hub.faults = { corrupt: true };
    await expect(downloadModel(ID)).rejects.toMatchObject({
      code: "verification",
      message: expect.stringContaining(sha256(weights)),
    });
    expect(existsSync(blob())).toBe(false);
    expect(existsSync(`${blob()}.incomplete`)).toBe(false);
  });

  test("is tried again when the hub is busy", async () => {
    await usual();
    hub.faults = { busy: 2 };
    await downloadModel(ID);
    expect(existsSync(blob())).toBe(true);
  });
});

describe("access", () => {
  test("the token goes to the hub, from the option, the variable or the login, and never to the CDN", async () => {
    await usual();
    hub.faults = { token: "secret" };
    await downloadModel(ID, { token: "secret" });
    expect(
      hub.requests
        .filter(({ server }) => server === "hub")
        .every(({ authorization }) => authorization === "Bearer secret"),
    ).toBe(true);
    expect(hub.requests.filter(({ server }) => server === "cdn").map(({ authorization }) => authorization)).toEqual([
      undefined,
    ]);
    vi.stubEnv("HF_TOKEN", "secret");
    await downloadModel(ID);
    vi.stubEnv("HF_TOKEN", undefined);
    writeFileSync(join(folder, "token"), "secret\n");
    await downloadModel(ID);
  });

  test("a gated, a hidden and a missing model, revision or file say what to do", async () => {
    await usual();
    hub.faults = { token: "secret", gated: true };
    await expect(downloadModel(ID)).rejects.toMatchObject({
      message: expect.stringMatching(/gated: accept its conditions at http.*org\/tiny.*HF_TOKEN/),
    });
    hub.faults = { token: "secret" };
    await expect(downloadModel(ID)).rejects.toMatchObject({
      code: "not_found",
      message: expect.stringMatching(/HF_TOKEN/),
    });
    await expect(downloadModel(ID, { token: "wrong" })).rejects.toMatchObject({
      code: "not_found",
      message: expect.stringMatching(/has no access/),
    });
    hub.faults = {};
    await expect(openCheckpoint("org/none")).rejects.toMatchObject({
      code: "not_found",
      message: expect.stringMatching(/no file or folder org\/none here/),
    });
    await expect(downloadModel(`${ID}@v9`)).rejects.toMatchObject({
      code: "not_found",
      message: expect.stringMatching(/no such revision/),
    });
  });
});

test("what is a hub id", () => {
  expect(parseHubId("org/name")).toEqual({ id: "org/name", revision: "main", file: undefined });
  expect(parseHubId("org/name@refs/pr/1")).toEqual({ id: "org/name", revision: "refs/pr/1", file: undefined });
  expect(parseHubId("org/n.a-m_e@v1/sub/x-q4.gguf")).toEqual({
    id: "org/n.a-m_e",
    revision: "v1",
    file: "sub/x-q4.gguf",
  });
  for (const spec of ["name", "a/b/c", "../x", "./x", "/a/b", "org/../x", "a//b", "org/name@"])
    expect(parseHubId(spec)).toBeUndefined();
});
