#!/usr/bin/env node
/** Runs the CLI: from its TypeScript in a clone (`npm ci` is all it needs), from `dist` in an installed package. */
import { existsSync } from "node:fs";

const [major, minor] = process.versions.node.split(".").map(Number);
if (major < 20 || (major === 20 && minor < 19)) {
  process.stderr.write(`nibble needs Node 20.19 or later; this is ${process.versions.node}.\n`);
  process.exit(1);
}
const source = new URL("../src/cli/main.ts", import.meta.url);
if (existsSync(source)) {
  await import(`./typescript.js?run=${source.href}`);
} else {
  await import("../dist/src/cli/main.js");
}
