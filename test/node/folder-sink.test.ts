import { spawn } from "node:child_process";
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, symlinkSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect, test } from "vitest";
import { readText } from "../../src/files.ts";
import { nodeFile, nodeFolder } from "../../src/node/files.ts";
import { nodeSink } from "../../src/node/folder-sink.ts";
import { repoPath } from "../helpers.ts";

const fresh = () => mkdtempSync(join(tmpdir(), "nibble-sink-"));
const bytes = (text: string) => new TextEncoder().encode(text);

async function put(sink: Awaited<ReturnType<typeof nodeSink>>, path: string, content: string): Promise<void> {
  const file = await sink.create(path);
  await file.write(bytes(content));
  await file.close();
}

test("a folder appears at commit, and can be read back before", async () => {
  const at = fresh();
  const sink = await nodeSink(join(at, "model"));
  await put(sink, "onnx/model.onnx", "graph");
  expect(existsSync(join(at, "model"))).toBe(false);
  expect(await sink.written.list()).toEqual(["onnx/model.onnx"]);
  expect(await readText(sink.written, "onnx/model.onnx")).toBe("graph");
  await sink.commit();
  expect(readdirSync(at)).toEqual(["model"]);
  expect(readFileSync(join(at, "model/onnx/model.onnx"), "utf8")).toBe("graph");
});

test("abort leaves nothing, also with a file open", async () => {
  const at = fresh();
  const sink = await nodeSink(join(at, "model"));
  await (await sink.create("a")).write(bytes("x"));
  await sink.abort();
  expect(readdirSync(at)).toEqual([]);
  await expect(sink.create("b")).rejects.toMatchObject({ code: "aborted" });
});

test("an empty folder is taken, one with files is refused, one that is no model even with overwrite", async () => {
  const at = fresh();
  mkdirSync(join(at, "model"));
  await (await nodeSink(join(at, "model"))).abort();
  writeFileSync(join(at, "model/thesis.txt"), "years of work");
  await expect(nodeSink(join(at, "model"))).rejects.toMatchObject({ code: "bad_option" });
  await expect(nodeSink(join(at, "model"), { overwrite: true })).rejects.toMatchObject({
    code: "bad_option",
    message: expect.stringContaining("nibble.json"),
  });
  await expect(nodeSink(join(at, "model/thesis.txt"))).rejects.toMatchObject({ code: "bad_option" });
});

test("overwrite keeps the old model until the new one is whole", async () => {
  const at = fresh();
  const first = await nodeSink(join(at, "model"));
  await put(first, "nibble.json", "old");
  await put(first, "stale", "old");
  await first.commit();

  const aborted = await nodeSink(join(at, "model"), { overwrite: true });
  await put(aborted, "nibble.json", "half");
  await aborted.abort();
  expect(readFileSync(join(at, "model/nibble.json"), "utf8")).toBe("old");

  const second = await nodeSink(join(at, "model"), { overwrite: true });
  await put(second, "nibble.json", "new");
  await second.commit();
  expect(readdirSync(at)).toEqual(["model"]);
  expect(readdirSync(join(at, "model"))).toEqual(["nibble.json"]);
});

test("what dead processes left is removed, what living ones write is not", async () => {
  const at = fresh();
  const dead = 2 ** 22 + 1; // above Linux' largest process id
  mkdirSync(join(at, `model.partial-${dead}`));
  mkdirSync(join(at, `model.partial-${process.ppid}`));
  mkdirSync(join(at, "model.partial-mine"));
  await (await nodeSink(join(at, "model"))).abort();
  expect(readdirSync(at).sort()).toEqual([`model.partial-${process.ppid}`, "model.partial-mine"].sort());
});

test("a swap that was cut in two gives the old model back", async () => {
  const at = fresh();
  mkdirSync(join(at, `model.replaced-${2 ** 22 + 1}`));
  writeFileSync(join(at, `model.replaced-${2 ** 22 + 1}`, "nibble.json"), "old");
  await expect(nodeSink(join(at, "model"))).rejects.toMatchObject({ code: "bad_option" });
  expect(readFileSync(join(at, "model/nibble.json"), "utf8")).toBe("old");
});

test.skipIf(!existsSync("/dev/full"))("a full disk is no_space", async () => {
  const at = fresh();
  const sink = await nodeSink(join(at, "model"));
  symlinkSync("/dev/full", join(at, `model.partial-${process.pid}`, "weights"));
  const file = await sink.create("weights");
  await expect(file.write(bytes("x"))).rejects.toMatchObject({ code: "no_space" });
  await sink.abort();
  expect(readdirSync(at)).toEqual([]);
});

test("paths out of the folder are refused", async () => {
  const at = fresh();
  const sink = await nodeSink(join(at, "model"));
  await expect(sink.create("../x")).rejects.toMatchObject({ code: "bad_option" });
  await sink.abort();
  await expect(nodeFolder(at).open("../x")).rejects.toMatchObject({ code: "bad_file" });
});

test.each(["SIGINT", "SIGTERM"] as const)("%s in the middle leaves nothing", async (signal) => {
  const at = fresh();
  const script = `
    import { nodeSink } from ${JSON.stringify(repoPath("src/node/folder-sink.ts"))};
    const sink = await nodeSink(${JSON.stringify(join(at, "model"))});
    const file = await sink.create("a");
    await file.write(new Uint8Array(10));
    console.log("writing");
    setInterval(() => {}, 1000);`;
  const child = spawn(process.execPath, ["--import", "tsx", "--input-type=module", "-e", script], {
    cwd: repoPath(),
    stdio: ["ignore", "pipe", "inherit"],
  });
  await new Promise((resolve) => child.stdout.once("data", resolve));
  expect(readdirSync(at)).toEqual([`model.partial-${child.pid}`]);
  child.kill(signal);
  const [, endedBy] = await new Promise<[number | null, string | null]>((resolve) =>
    child.once("exit", (code, by) => resolve([code, by])),
  );
  expect(endedBy).toBe(signal);
  expect(readdirSync(at)).toEqual([]);
});

test("a file is read at any position, and never beyond its end", async () => {
  const path = join(fresh(), "f");
  writeFileSync(path, "0123456789");
  const file = await nodeFile(path);
  expect(new TextDecoder().decode(await file.read(3, 4))).toBe("3456");
  await expect(file.read(8, 3)).rejects.toMatchObject({ code: "bad_file" });
  await file.close?.();
  await expect(nodeFile(`${path}x`)).rejects.toMatchObject({ code: "not_found" });
});
