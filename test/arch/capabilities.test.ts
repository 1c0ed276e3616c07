/** Combinations of family and cache that cannot work are refused by name, with the reason. */
import { expect, test } from "vitest";
import { capabilitiesOf, requireFeature } from "../../src/arch/capabilities.ts";

test.each([
  [{ model_type: "lfm2" }, "speculation", /lfm2 goes without speculation: its convolutions/],
  [{ model_type: "lfm2" }, "prefix cache", /lfm2 goes without prefix cache/],
  [{ model_type: "lfm2" }, "int8 cache", /lfm2 goes without int8 cache/],
  [{ model_type: "gemma2" }, "int8 cache", /gemma2 goes without int8 cache: its scores are capped/],
] as const)("%o and %s", (config, feature, message) => {
  expect(() => requireFeature(capabilitiesOf(config, 128), feature, "option")).toThrow(message);
});

test("every other family has every feature, a family of another exporter included", () => {
  for (const model_type of ["llama", "gemma3_text", "mixtral", "not-ours"]) {
    expect(capabilitiesOf({ model_type }, 128)).toEqual({ modelType: model_type, without: {} });
  }
});
