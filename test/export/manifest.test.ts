import { expect, test } from "vitest";
import { resolveModel } from "../../src/arch/index.ts";
import { floatWeights } from "../../src/arch/weights.ts";
import { exportModel } from "../../src/export/export.ts";
import { memorySink } from "../../src/memory-files.ts";
import { openInMemory } from "../fixtures/open-in-memory.ts";
import { repoPath } from "../helpers.ts";

test("a manifest is the same wherever the checkpoint and its adapter lie", async () => {
  const stories = await openInMemory(repoPath("models", "stories260k"));
  const sources = await Promise.all(
    ["/home/ann", "/data"].map(async (place) => {
      const name = `${place}/stories + ${place}/adapter`;
      const notes = [`${place}/adapter is merged: 5 tensors changed.`];
      const model = resolveModel({ ...stories, name, notes });
      return (await exportModel({ model, weights: floatWeights(stories) }, memorySink("m"), { dtype: "fp32" })).source;
    }),
  );
  expect(sources[0]).toMatchObject({ name: "stories + adapter", notes: ["adapter is merged: 5 tensors changed."] });
  expect(sources[1]).toEqual(sources[0]);
});
