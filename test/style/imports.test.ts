/** Which part may import which (STYLE.md, "Where things live"), and what may run in a page. */
import { readdirSync, readFileSync } from "node:fs";
import { dirname, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";

const root = fileURLToPath(new URL("../..", import.meta.url));

/** A part of src imports its own rank or a lower one. */
const rank: Readonly<Record<string, number>> = {
  tensor: 0,
  checkpoint: 1,
  onnx: 1,
  tokenizer: 1,
  grammar: 1,
  arch: 2,
  kv: 2,
  export: 3,
  runtime: 4,
  eval: 5,
};
/** Node's side of the tree, which a page never loads. */
const nodeOnly =
  /^(src\/(node|cli)\/|src\/index\.ts$|server\/(main|node)|bin\/|browser-demo\/vite\.config|quant\/data\/make)/;

interface Import {
  readonly from: string;
  readonly to: string;
}

function sourceFiles(): string[] {
  return ["src", "quant", "server", "browser-demo"].flatMap((top) =>
    readdirSync(join(root, top), { recursive: true, encoding: "utf8" })
      .map((path) => `${top}/${path.replaceAll("\\", "/")}`)
      .filter((path) => /\.tsx?$/.test(path) && !/\/(dist|node_modules)\//.test(path)),
  );
}

function imports(): Import[] {
  const found: Import[] = [];
  for (const from of sourceFiles()) {
    const text = readFileSync(join(root, from), "utf8");
    for (const [, specifier] of text.matchAll(/(?:\bfrom|^import|\bimport\()\s*["']([^"']+)["']/gm)) {
      const to = specifier.startsWith(".")
        ? relative(root, join(root, dirname(from), specifier)).replaceAll("\\", "/")
        : specifier;
      found.push({ from, to });
    }
  }
  return found;
}

const show = ({ from, to }: Import): string => `${from} -> ${to}`;
const partOf = (path: string): string => /^src\/([^/.]+)\//.exec(path)?.[1] ?? "";

test("imports point left: tensor <- checkpoint, onnx, tokenizer <- arch, kv <- export <- runtime <- eval", () => {
  const wrong = imports().filter(({ from, to }) => rank[partOf(to)] > (rank[partOf(from)] ?? Number.POSITIVE_INFINITY));
  expect(wrong.map(show)).toEqual([]);
});

test("the core imports neither quant, server nor browser-demo, and nothing imports the CLI", () => {
  const wrong = imports().filter(
    ({ from, to }) =>
      (partOf(from) in rank && /^(quant|server|browser-demo)\//.test(to)) ||
      (to.startsWith("src/cli/") && !from.startsWith("src/cli/")),
  );
  expect(wrong.map(show)).toEqual([]);
});

test("what runs in a page imports nothing of Node", () => {
  const wrong = imports().filter(
    ({ from, to }) =>
      !nodeOnly.test(from) && (/^(node:|onnxruntime-node|koffi|commander)/.test(to) || nodeOnly.test(to)),
  );
  expect(wrong.map(show)).toEqual([]);
});

test("what runs in a page uses neither Buffer nor process", () => {
  const wrong = sourceFiles().filter(
    (path) => !nodeOnly.test(path) && /\b(Buffer|process)\.[a-z]/.test(readFileSync(join(root, path), "utf8")),
  );
  expect(wrong).toEqual([]);
});

test("every source file stays under 500 lines", () => {
  const long = sourceFiles().filter((path) => readFileSync(join(root, path), "utf8").split("\n").length > 500);
  expect(long).toEqual([]);
});

test("the reader of imports sees them", () => {
  expect(imports().length).toBeGreaterThan(10);
});
