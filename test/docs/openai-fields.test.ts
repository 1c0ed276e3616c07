import { expect, test } from "vitest";
import { fieldsMarkdown } from "../../server/openai/fields.ts";
import { repoPath } from "../helpers.ts";

test("docs/openai-fields.md is the table that the server goes by (vitest -u writes it)", async () => {
  await expect(fieldsMarkdown()).toMatchFileSnapshot(repoPath("docs", "openai-fields.md"));
});
