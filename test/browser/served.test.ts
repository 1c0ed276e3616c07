/** The page as `nibble serve` shows it: the served models answer at once, and run in the page where that is chosen. */
import { existsSync, readFileSync, statSync } from "node:fs";
import { extname, join } from "node:path";
import { serve as listen } from "@hono/node-server";
import type { Page } from "playwright-core";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { createApp } from "../../server/app.ts";
import { ModelRegistry } from "../../server/models.ts";
import type { PageFiles } from "../../server/page.ts";
import { loadEngine } from "../../src/node/engine.ts";
import { type Built, buildPage } from "./build.ts";
import { LIMIT_MS, noChromium, openPage, withBrowser } from "./chromium.ts";
import { TYPES } from "./host.ts";

describe.skipIf(noChromium())("a served page", { timeout: LIMIT_MS + 30_000 }, () => {
  let built: Built;
  let registry: ModelRegistry;
  let server: ReturnType<typeof listen>;
  let url: string;

  beforeAll(async () => {
    built = await buildPage("q4");
    const folder = join(built.folder, "models/stories260k");
    const load = () => loadEngine(folder, { threads: 1 });
    registry = new ModelRegistry(["first", "second"].map((id) => ({ id, created: 0, sizeBytes: 1, folder, load })));
    await registry.use(undefined).then((lease) => lease.release());
    const page: PageFiles = async (path) => {
      const file = join(built.folder, path.replace(/^models\/(first|second)\//, "models/stories260k/"));
      if (!existsSync(file) || !statSync(file).isFile()) return undefined;
      const contentType = TYPES[extname(file)] ?? "application/octet-stream";
      return { body: new Uint8Array(readFileSync(file)), sizeBytes: statSync(file).size, contentType };
    };
    const { fetch } = createApp({ models: registry, allowedHosts: ["127.0.0.1"], page });
    server = await new Promise((resolve) => {
      const started = listen({ fetch, port: 0, hostname: "127.0.0.1" }, ({ port }) => {
        url = `http://127.0.0.1:${port}`;
        resolve(started);
      });
    });
  });
  afterAll(async () => {
    server?.close();
    await registry?.dispose();
    await built?.remove();
  });

  const says = async (page: Page, by: RegExp) => {
    await page.getByRole("button", { name: "New chat" }).click();
    await page.getByRole("textbox", { name: "Message" }).fill("Once upon a time");
    await page.getByRole("textbox", { name: "Message" }).press("Enter");
    await expect.poll(() => page.locator(".stats").count(), { timeout: 30_000 }).toBe(1);
    expect(await page.locator(".stats").last().textContent()).toMatch(by);
  };

  test("answers from the server without a click, by any of its models, and in the page where that is chosen", () =>
    withBrowser(async (context) => {
      const { page, errors } = await openPage(context, url);
      await page.locator(".model-button", { hasText: "firstServer" }).waitFor();
      await page.getByText("begin a story and it goes on. What you type goes to this page's server only.").waitFor();
      await says(page, /first · server/);
      expect(await page.locator(".status").textContent()).toMatch(/Context \d+ of 512Answers come from the server/);

      await page.goto(`${url}/#models`);
      await page.locator("li", { hasText: "second" }).getByRole("button", { name: "Ask the server" }).click();
      await page.locator(".model-button", { hasText: "secondServer" }).waitFor();
      await says(page, /second · server/);
      await page.getByText("of 512Answers").waitFor(); // told by the server once the model is loaded

      await page.goto(`${url}/#models`);
      await page.locator("li", { hasText: "second" }).getByRole("button", { name: "Run in this page" }).click();
      await page.locator(".model-button", { hasText: "secondWASM" }).waitFor();
      await says(page, /second · wasm/);

      await page.reload();
      await page.locator(".model-button", { hasText: "secondWASM" }).waitFor();
      await page.getByRole("button", { name: "Settings", exact: true }).click();
      expect(await page.getByRole("radio", { name: "In this page" }).isChecked()).toBe(true);
      await page.getByText("On the server", { exact: true }).click();
      await page.keyboard.press("Escape");
      await page.locator(".model-button", { hasText: "secondServer" }).waitFor();
      expect(errors).toEqual([]);
    }));

  test("keeps a message that is sent before the page knows who answers, and sends it then", () =>
    withBrowser(async (context) => {
      await context.route("**/v1/models", async (route) => {
        await new Promise((done) => setTimeout(done, 1500));
        await route.continue();
      });
      const { page } = await openPage(context, url);
      const input = page.getByRole("textbox", { name: "Message" });
      await input.fill("Once upon");
      await input.press("Enter");
      await page.locator(".status", { hasText: "Sent as soon as the model is ready" }).waitFor();
      await input.fill("Once upon a time"); // who goes on writing has not sent it
      await page.locator(".status", { hasText: "Sent as soon" }).waitFor({ state: "detached" });
      await input.press("Enter");
      await page.locator(".stats", { hasText: "first · server" }).waitFor({ timeout: 30_000 });
      expect(await page.getByRole("article", { name: "You" }).allTextContents()).toEqual(["Once upon a time"]);
      expect(await input.inputValue()).toBe("");
    }));
});
