/**
 * The file that llama.cpp is measured on: a checkpoint as its own Q4_0 (embedding and head, which are one matrix here,
 * in Q8_0, as llama-quantize leaves them where rows are no multiple of 256), with the tokenizer of a GGUF of the model.
 *
 *   npx tsx test/bench/q4-0-gguf.ts CHECKPOINT ANY.gguf OUT.gguf
 */
import { writeFile } from "node:fs/promises";
import { readGguf } from "../../src/checkpoint/gguf.ts";
import type { GgufEntries, TypedValue } from "../../src/checkpoint/gguf-writer.ts";
import { nodeFile } from "../../src/node/files.ts";
import { openCheckpoint } from "../../src/node/open-checkpoint.ts";
import { toGguf } from "../checkpoint/to-gguf.ts";

const [checkpointPath, tokenizerPath, outPath] = process.argv.slice(2);
const tokenizerFile = await nodeFile(tokenizerPath);
const { metadata } = await readGguf(tokenizerFile);
await tokenizerFile.close?.();
const tokenizer = [...metadata].filter(([key]) => key.startsWith("tokenizer."));
/** Types that llama.cpp insists on. */
const typed = (key: string, value: unknown): GgufEntries[string] => {
  if (key.endsWith("_id")) return { type: "u32", value } as TypedValue;
  if (key.endsWith("token_type")) return { type: "i32", value } as TypedValue;
  return value as GgufEntries[string];
};
const checkpoint = await openCheckpoint(checkpointPath);
const bytes = await toGguf(checkpoint, {
  quantizeAs: "Q4_0",
  quantizeEmbeddingAs: "Q8_0",
  extra: Object.fromEntries(tokenizer.map(([key, value]) => [key, typed(key, value)])),
});
await writeFile(outPath, bytes);
await checkpoint.dispose();
console.log(`${outPath}: ${(bytes.length / 1e6).toFixed(1)} MB`);
