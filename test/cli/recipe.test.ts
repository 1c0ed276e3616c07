import { Command } from "commander";
import { expect, test } from "vitest";
import { type RecipeFlags, recipeOf, withRecipeFlags } from "../../src/cli/recipe.ts";

function parse(...args: string[]): RecipeFlags {
  const command = withRecipeFlags(new Command())
    .exitOverride()
    .configureOutput({ writeErr: () => {} });
  return command
    .action(() => {})
    .parse(args, { from: "user" })
    .opts();
}

test("no flag is the default preset at 4 bits in groups of 32", () => {
  expect(recipeOf(parse())).toMatchObject({ name: "default", bits: 4, groupSize: 32, symmetric: false });
});

test("--method and its options reach the recipe", () => {
  const recipe = recipeOf(
    parse("--method", "gptq", "--bits", "3", "--group-size", "128", "--symmetric", "--head-bits", "16"),
  );
  expect(recipe).toMatchObject({ name: "gptq", bits: 3, groupSize: 128, symmetric: true, head: undefined });
});

test("--preset and --method together are an error that names both", () => {
  expect(() => recipeOf(parse("--preset", "fast", "--method", "rtn"))).toThrow(/--preset fast and --method rtn/);
});

test("an unknown method and a group size that is none are refused", () => {
  expect(() => parse("--method", "magic")).toThrow(/magic/);
  expect(() => parse("--group-size", "many")).toThrow(/number, or "row"/);
});

test("--learn is a step of a recipe that calibrates", () => {
  expect(recipeOf(parse("--learn"))).toMatchObject({ name: "default", learned: { steps: 40 } });
  expect(recipeOf(parse("--method", "gptq", "--learn", "8"))).toMatchObject({ learned: { steps: 8 } });
  expect(() => recipeOf(parse("--method", "smoothquant", "--learn"))).toThrow(/without learn/);
});

test("--rotate and --tune are steps of any recipe, tuning in as many steps as are asked for", () => {
  expect(recipeOf(parse("--rotate", "--tune"))).toMatchObject({ name: "default", rotation: 1, tuning: { steps: 64 } });
  expect(recipeOf(parse("--method", "rtn", "--tune", "8"))).toMatchObject({ windows: 0, tuning: { steps: 8 } });
  expect(() => parse("--tune", "0")).toThrow(/tune/);
});
