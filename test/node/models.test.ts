import { existsSync } from "node:fs";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, expect, test, vi } from "vitest";
import { listModels, rememberModel, removeModel } from "../../src/node/models.ts";

let folder: string;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "nibble-models-"));
  vi.stubEnv("NIBBLE_CACHE", join(folder, "cache"));
  vi.stubEnv("HF_HUB_CACHE", join(folder, "hub"));
});
afterAll(async () => {
  vi.unstubAllEnvs();
  await rm(folder, { recursive: true });
});

async function make(name: string): Promise<string> {
  const path = join(folder, name);
  await mkdir(join(path, "onnx"), { recursive: true });
  await writeFile(join(path, "nibble.json"), "{}");
  await writeFile(join(path, "onnx", "model_q4.onnx"), new Uint8Array(1000));
  return path;
}

test("a remembered folder is listed with its size and gone after rm", async () => {
  const path = await make("tiny-q4");
  await rememberModel(path);
  await rememberModel(path);
  expect(await listModels()).toMatchObject([{ kind: "made", name: "tiny-q4", path, sizeBytes: 1002 }]);
  await removeModel("tiny-q4");
  expect(existsSync(path)).toBe(false);
  expect(await listModels()).toEqual([]);
});

test("a folder that Nibble did not make is never deleted", async () => {
  const path = join(folder, "holiday");
  await mkdir(path);
  await writeFile(join(path, "photo.jpg"), "x");
  await expect(removeModel(path)).rejects.toMatchObject({ code: "not_found" });
  expect(existsSync(join(path, "photo.jpg"))).toBe(true);
});

test("two models of one name are told apart by their paths", async () => {
  const paths = [await make("a/same"), await make("b/same")];
  for (const path of paths) await rememberModel(path);
  await expect(removeModel("same")).rejects.toMatchObject({ code: "bad_option" });
  await removeModel(paths[0]);
  expect((await listModels()).map((model) => model.path)).toEqual([paths[1]]);
});

test("a model in the hub's cache is listed under its id and can be removed", async () => {
  const repo = join(folder, "hub", "models--org--tiny");
  const commit = "a".repeat(40);
  await mkdir(join(repo, "snapshots", commit), { recursive: true });
  await mkdir(join(repo, "refs"), { recursive: true });
  await writeFile(join(repo, "refs", "main"), commit);
  await writeFile(join(repo, "snapshots", commit, "config.json"), "{}  ");
  const listed = (await listModels()).filter((model) => model.kind === "downloaded");
  expect(listed).toMatchObject([{ name: "org/tiny", path: repo, sizeBytes: 4 }]);
  await removeModel("org/tiny");
  expect(existsSync(repo)).toBe(false);
});
