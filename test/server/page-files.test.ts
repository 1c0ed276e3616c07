import { expect, test } from "vitest";
import { pageFiles } from "../../server/node/page-files.ts";
import { repoPath } from "../helpers.ts";

const files = pageFiles(new Map([["served", repoPath("models", "stories260k")]]));

test("a served model's files are offered to pages under its id", async () => {
  const file = await files("models/served/config.json");
  expect(JSON.parse(await new Response(file?.body).text()).model_type).toBe("llama");
  expect(file?.contentType).toBe("application/json");
});

test("no path leads out of the model's folder, and no other folder is offered", async () => {
  for (const path of [
    "models/served/../../package.json",
    "models/served/..",
    "models/other/config.json",
    "models/served/",
  ]) {
    expect(await files(path)).toBeUndefined();
  }
});
