/** What a user does with the page, for tests, and the pictures of it in the README. */
import { mkdir } from "node:fs/promises";
import type { BrowserContext, Page } from "playwright-core";
import { afterAll, beforeAll, expect } from "vitest";
import { repoPath } from "../helpers.ts";
import { type Built, buildPage } from "./build.ts";
import { openPage, withBrowser } from "./chromium.ts";
import { type Host, startHost } from "./host.ts";

/** Written where a picture is asked for: NIBBLE_SCREENSHOTS=docs/screenshots. */
const pictures = process.env.NIBBLE_SCREENSHOTS;

export async function picture(page: Page, name: string): Promise<void> {
  if (!pictures) return;
  await mkdir(repoPath(pictures), { recursive: true });
  await page.screenshot({ path: repoPath(pictures, `${name}.png`), animations: "disabled" });
}

export async function openModel(page: Page): Promise<void> {
  await page.getByRole("button", { name: "Open stories260K" }).first().click();
  await page.waitForSelector(".pill.on");
}
export const composer = (page: Page) => page.getByRole("textbox", { name: "Message" });
export const answers = (page: Page) => page.getByRole("article", { name: "Answer" });
export const finished = (page: Page) => page.waitForSelector(".message .stats");

export async function ask(page: Page, text: string): Promise<void> {
  await composer(page).fill(text);
  await composer(page).press("Enter");
}

/** Greedy and short, so that runs are alike. */
export async function setSampling(page: Page): Promise<void> {
  await page.evaluate(() => {
    const kept = JSON.parse(localStorage.getItem("nibble-settings") ?? "{}") as object;
    const chosen = { ...kept, temperature: 0, repetitionPenalty: 1, maxTokens: 64 };
    localStorage.setItem("nibble-settings", JSON.stringify(chosen));
  });
  await page.reload();
}

export interface PageTests {
  readonly host: Host;
  /** The folder of the built page. */
  readonly folder: string;
  /** A test in a browser of its own, which fails for any error on the page's console. */
  inPage(
    run: (page: Page, context: BrowserContext, errors: string[]) => Promise<void>,
    options?: { path?: string; width?: number; height?: number; flags?: readonly string[] },
  ): Promise<void>;
}

/** The page with stories260K at 4 bits, built and served for the tests of a file. @param more folders of the host */
export function servedForTests(more: Readonly<Record<string, string>> = {}): PageTests {
  let built: Built;
  let host: Host;
  beforeAll(async () => {
    built = await buildPage("q4");
    host = await startHost({ folders: { "/": built.folder, ...more }, isolated: true });
  });
  afterAll(async () => {
    await host?.close();
    await built?.remove();
  });
  return {
    get host() {
      return host;
    },
    get folder() {
      return built.folder;
    },
    inPage: (run, options = {}) =>
      withBrowser(async (context) => {
        host.intercept = undefined;
        host.down = false;
        const { page, errors } = await openPage(context, host.url + (options.path ?? "/"));
        await run(page, context, errors);
        // The page asks a static host for /v1/models once, to learn whether a server is behind it.
        expect(errors.filter((text) => !text.includes("404"))).toEqual([]);
      }, options),
  };
}
