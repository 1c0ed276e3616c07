/** Chromium for tests: found, started with its own time limit, and ended for certain. */
import { accessSync, constants, existsSync } from "node:fs";
import { delimiter, join } from "node:path";
import { type BrowserContext, chromium, type Page } from "playwright-core";

const NAMES = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"];
const FIXED = [
  "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
  "/Applications/Chromium.app/Contents/MacOS/Chromium",
];

/** CHROME_PATH, then what the PATH has, then where macOS keeps it. */
export function findChromium(): string | undefined {
  const { CHROME_PATH, PATH = "" } = process.env;
  if (CHROME_PATH) return CHROME_PATH;
  const onPath = PATH.split(delimiter).flatMap((folder) => NAMES.map((name) => join(folder, name)));
  return [...onPath.filter(isExecutable), ...FIXED.filter((path) => existsSync(path))][0];
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

export const chromiumPath = findChromium();

/** For describe.skipIf: says on the console what is missing. */
export function noChromium(): boolean {
  if (chromiumPath) return false;
  console.warn("skipped: no Chrome or Chromium on the PATH (set CHROME_PATH)");
  return true;
}

const BASE = [
  "--no-sandbox",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
];
/** Gives SwiftShader as the WebGPU adapter where there is no GPU; without it a headless Chromium has no adapter. */
export const WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"];

/** For a browser's whole run, and with room for a build around it for a test: machines that test are busy ones. */
export const LIMIT_MS = 120_000;

/** A browser of its own with a fresh profile. It is killed when `timeoutMs` is over, whatever it is doing. */
export async function withBrowser<T>(
  run: (context: BrowserContext, pid: number) => Promise<T>,
  options: { flags?: readonly string[]; timeoutMs?: number; width?: number; height?: number } = {},
): Promise<T> {
  const { flags = [], timeoutMs = LIMIT_MS, width = 1280, height = 800 } = options;
  const server = await chromium.launchServer({
    executablePath: chromiumPath,
    headless: true,
    args: [...BASE, ...flags],
  });
  const limit = setTimeout(() => server.kill(), timeoutMs);
  try {
    const browser = await chromium.connect(server.wsEndpoint());
    const context = await browser.newContext({ viewport: { width, height }, acceptDownloads: false });
    context.setDefaultTimeout(Math.min(timeoutMs, 45_000)); // a hung wait says where, before the browser is killed
    return await run(context, server.process().pid!);
  } finally {
    clearTimeout(limit);
    await server.close().catch(() => server.kill());
  }
}

/** A page whose console errors fail the test that asks for them. */
export async function openPage(context: BrowserContext, url: string): Promise<{ page: Page; errors: string[] }> {
  const page = await context.newPage();
  const errors: string[] = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  page.on("console", (message) => {
    if (message.type() === "error") errors.push(message.text());
  });
  await page.goto(url);
  return { page, errors };
}
