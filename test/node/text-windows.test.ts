import { writeFile } from "node:fs/promises";
import { expect, test } from "vitest";
import { readTextFile, textWindows } from "../../src/node/text-windows.ts";
import { loadTokenizer } from "../../src/tokenizer/hf-tokenizer.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { temporaryFolder } from "../fixtures/temporary-folder.ts";
import { repoPath } from "../helpers.ts";

const stories = repoPath("models", "stories260k");
const checkpoint = await openInMemory(stories);
const tokenizer = loadTokenizer(checkpoint.sideFiles, { config: checkpoint.config });
const sample = await readTextFile(repoPath("models", "stories260k", "stories-sample.txt"), tokenizer);
const path = temporaryFolder("text");

test("no window is both calibrated on and held back", () => {
  const { calibration, heldBack, record } = textWindows(checkpoint, tokenizer, sample, 16);
  const seen = new Set(calibration.map(String));
  expect(heldBack.filter((window) => seen.has(String(window)))).toEqual([]);
  expect(record).toMatchObject({ sequenceLength: 512, calibrationWindows: 16, heldBackWindows: heldBack.length });
  expect(heldBack.length).toBeGreaterThan(0);
});

test("documents of a .txt are separated by <|endoftext|>", () => {
  expect(sample.texts.length).toBeGreaterThan(100);
  expect(sample.texts.join("")).not.toContain("<|endoftext|>");
});

test("a line of .jsonl is a string or has text", async () => {
  await writeFile(`${path}.jsonl`, '"one"\n\n{"text": "two"}\n');
  expect((await readTextFile(`${path}.jsonl`, tokenizer)).texts).toEqual(["one", "two"]);
});

test("a broken line is named", async () => {
  await writeFile(`${path}.jsonl`, '"one"\n{"body": "two"}\n');
  await expect(readTextFile(`${path}.jsonl`, tokenizer)).rejects.toThrow(/line 2: neither text nor messages/);
});

test("a text of less than two windows is refused", () => {
  const short = { name: "short", texts: ["Once upon a time"] };
  expect(() => textWindows(checkpoint, tokenizer, short, 4)).toThrow(/calibration|window/);
});
