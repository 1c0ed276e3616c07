/** --fit, --max-kl and --plan from the command line. */
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { repoPath } from "../helpers.ts";
import { nibble } from "./nibble.ts";

const stories = repoPath("models", "stories260k");
let folder: string;
const run = (args: readonly string[]) =>
  nibble(args, { cwd: folder, env: { NIBBLE_CACHE: join(folder, "cache"), HF_HUB_CACHE: join(folder, "hub") } });

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "nibble-plan-"));
});
afterAll(async () => {
  await rm(folder, { recursive: true });
});

describe("a plan", () => {
  const quantize = ["quantize", stories, "--kv", "fp32", "--preset", "fast"];

  test("fitted to a size keeps to it, is shown and kept, and replays to the same bytes", async () => {
    const made = await run([...quantize, "-o", "fit", "--fit", "250KB"]);
    expect(made).toMatchObject({ code: 0 });
    expect(made.stderr).toMatch(/layer +q_proj/);
    const manifest = JSON.parse(await readFile(join(folder, "fit", "nibble.json"), "utf8"));
    const bytes = ["onnx/model_q4.onnx", "onnx/model_q4.onnx_data"].map((path) => manifest.files[path].sizeBytes);
    expect(bytes[0] + bytes[1]).toBeLessThanOrEqual(250_000);
    const { plan } = JSON.parse(await readFile(join(folder, "fit", "plan.json"), "utf8"));
    expect(manifest.recipe.plan).toEqual(plan);
    expect(await run([...quantize, "-o", "replayed", "--plan", "fit/plan.json", "--quiet"])).toMatchObject({ code: 0 });
    const [first, second] = await Promise.all(
      ["fit", "replayed"].map((name) => readFile(join(folder, name, "nibble.json"))),
    );
    expect(second.equals(first)).toBe(true);
  });

  test("fitted to a drift keeps to it", async () => {
    const { code, stdout } = await run([...quantize, "-o", "close", "--max-kl", "0.1", "--json"]);
    expect(code).toBe(0);
    expect(JSON.parse(stdout).manifest.measured.drift.kl.mean).toBeLessThanOrEqual(0.1);
  });

  test("and flags that say the same thing are refused together, before anything is done", async () => {
    for (const flags of [
      ["--fit", "250KB", "--bits", "4"],
      ["--fit", "250KB", "--max-kl", "0.1"],
      ["--plan", "none.json"],
      ["--max-kl", "-1"],
      ["--fit", "large"],
    ]) {
      const { code, stderr } = await run([...quantize, "-o", "never", ...flags]);
      expect(code).not.toBe(0);
      expect(stderr).toContain(flags[0]);
      expect(stderr).not.toContain("sensitivity");
    }
  });
});
