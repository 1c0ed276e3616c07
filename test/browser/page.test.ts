/** The page as its users meet it: chat, recovery, the keyboard, a phone. */
import { readFileSync } from "node:fs";
import { cp, mkdtemp, rm, writeFile } from "node:fs/promises";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import type { AxeResults } from "axe-core";
import type { Page } from "playwright-core";
import { describe, expect, test } from "vitest";
import { LIMIT_MS, noChromium, openPage, WEBGPU, withBrowser } from "./chromium.ts";
import { answers, ask, finished, openModel, picture, servedForTests, setSampling } from "./driving.ts";
import { startHost } from "./host.ts";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

/** Rule and elements of everything that axe objects to. */
async function axeViolations(page: Page): Promise<string[]> {
  await page.evaluate(axe);
  const results = await page.evaluate(() =>
    (globalThis as unknown as { axe: { run(): Promise<AxeResults> } }).axe.run(),
  );
  return results.violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ target }) => target.join(" ")).join(", ")}`);
}

/** A model folder as another tool may leave it: without nibble.json, and with a chat template. */
async function withTemplate(folder: string): Promise<string> {
  const copy = join(await mkdtemp(join(tmpdir(), "nibble-template-")), "with-template");
  await cp(folder, copy, { recursive: true });
  await rm(join(copy, "nibble.json"));
  const template = "{{ bos_token }}{% for message in messages %}{{ message.content }} {% endfor %}";
  await writeFile(join(copy, "chat_template.jinja"), template);
  return copy;
}

describe.skipIf(noChromium())("the page", { timeout: LIMIT_MS + 30_000 }, () => {
  const SUBPATH = "/some/where/";
  const tests = servedForTests();

  test("answers, regenerates, edits and resends, and keeps the conversation", () =>
    tests.inPage(async (page) => {
      await setSampling(page);
      await openModel(page);
      await ask(page, "Once upon a time");
      await finished(page);
      const first = await answers(page).locator(".body").textContent();
      expect(first).toMatch(/^, there was a/);
      expect(await page.locator(".stats").textContent()).toMatch(
        /\d tok\/s · first token .* · 64 tokens · stories260k · wasm/,
      );
      expect(await page.locator(".status").textContent()).toMatch(/Context \d+ of 512.*KV cache .* fp32 full/);
      await picture(page, "chat");

      await page.getByRole("button", { name: "Regenerate" }).click();
      await finished(page);
      expect(await answers(page).locator(".body").textContent()).toBe(first);

      await page.getByRole("button", { name: "Edit and resend" }).click();
      await page.getByRole("textbox", { name: "Your message" }).fill("The little dog");
      await page.getByRole("button", { name: "Send", exact: true }).first().click();
      await expect.poll(() => answers(page).locator(".body").textContent()).not.toBe(first);
      await finished(page);
      const edited = await answers(page).locator(".body").textContent();

      await page.reload();
      await page
        .getByRole("button", { name: "The little dog", exact: true })
        .or(page.locator(".history li button").first())
        .first()
        .click();
      expect(await answers(page).locator(".body").textContent()).toBe(edited);
      await page.getByRole("button", { name: "Dark or light" }).click();
      await page.waitForSelector(".pill.on");
      await picture(page, "chat-dark");
    }));

  test("stops when told, and keeps what was said", () =>
    tests.inPage(async (page) => {
      await openModel(page);
      // from inside the page: the whole answer takes less than a click from outside does on a busy machine
      const stopped = page.evaluate(
        () =>
          new Promise<string>((resolve) => {
            new MutationObserver((_, observer) => {
              const said = document.querySelector(".message[data-role=assistant] .body")?.textContent ?? "";
              const stop = document.querySelector<HTMLButtonElement>('button[aria-label="Stop"]:not([hidden])');
              if (said === "" || !stop) return;
              observer.disconnect();
              stop.click();
              resolve(said);
            }).observe(document.body, { subtree: true, childList: true, characterData: true, attributes: true });
          }),
      );
      await ask(page, "Once upon a time");
      const said = await stopped;
      await page.waitForSelector(".message[data-role=assistant] .foot:not([hidden])");
      expect(await answers(page).locator(".body").textContent()).toContain(said.trim());
      expect(await page.getByRole("button", { name: "Send", exact: true }).isVisible()).toBe(true);
      await ask(page, " and then");
      await finished(page);
    }));

  test("copies, follows a system prompt and the sampling that were set, and keeps both", () =>
    tests.inPage(async (page, context) => {
      await context.grantPermissions(["clipboard-read", "clipboard-write"]);
      await setSampling(page);
      const folder = await withTemplate(join(tests.folder, "models/stories260k"));
      await page.goto(`${tests.host.url}/#models`);
      await page.getByLabel("Drop a model folder here").setInputFiles(folder);
      await page.locator(".model-button", { hasText: "with-template" }).waitFor();
      await page.goto(`${tests.host.url}/#chat`);
      const says = async () => {
        await page.getByRole("button", { name: "New chat" }).click();
        await ask(page, "Once upon a time");
        await finished(page);
        return answers(page).locator(".body").textContent();
      };
      const plain = await says();
      await answers(page).getByRole("button", { name: "Copy" }).click();
      const words = (text: string | null) => text?.split(/\s+/).join("").trim(); // a line break is an element there
      const copied = await page.evaluate(() => navigator.clipboard.readText());
      expect(words(copied)).toBe(words(plain));

      await page.getByRole("button", { name: "Settings", exact: true }).click();
      await page.getByRole("textbox", { name: "System prompt" }).fill("Tom had a big red ball.");
      await page.getByRole("slider", { name: "Longest answer" }).fill("32");
      await page.getByRole("button", { name: "Close settings" }).click();
      const instructed = await says();
      expect(instructed).not.toBe(plain?.slice(0, instructed?.length));
      expect(await page.locator(".stats").textContent()).toContain("32 tokens");
      await page.reload();
      await page.waitForSelector(".pill.on");
      expect(await says()).toBe(instructed);
      await rm(dirname(folder), { recursive: true });
    }));

  test("shows an answer's markdown, and nothing of it that fetches or runs", () =>
    tests.inPage(async (page, _context, errors) => {
      const content = [
        "**bold** and [a link](https://example.com)",
        "```js\nlet a = 1;\n```",
        "| a | b |\n| --- | --- |\n| 1 | 2 |",
        '<img src="x" onerror="hacked = 1"><script>hacked = 1</script><a href="javascript:hacked = 1">x</a>',
        '<form action="/"><input></form><style>body { display: none }</style>',
      ].join("\n\n");
      await page.evaluate(async (content) => {
        const opened = indexedDB.open("nibble", 1);
        await new Promise((done) => (opened.onsuccess = done));
        const store = opened.result.transaction("conversations", "readwrite").objectStore("conversations");
        const messages = [{ role: "assistant", content }];
        const put = store.put({ id: "made", title: "Made", createdAt: 1, updatedAt: 1, messages });
        await new Promise((done) => (put.onsuccess = done));
      }, content);
      await page.reload();
      await page.getByRole("button", { name: "Made", exact: true }).click();
      const body = answers(page).locator(".body");
      expect(await body.locator("strong").textContent()).toBe("bold");
      expect(await body.locator("pre code").textContent()).toBe("let a = 1;\n");
      expect(await body.locator("td").allTextContents()).toEqual(["1", "2"]);
      expect(await body.locator("img, script, form, input, style, [href^=javascript], [onerror]").count()).toBe(0);
      const link = body.getByRole("link", { name: "a link" });
      expect([await link.getAttribute("target"), await link.getAttribute("rel")]).toEqual([
        "_blank",
        "noopener noreferrer",
      ]);
      expect(await page.evaluate(() => "hacked" in globalThis)).toBe(false);
      // the browser says what the policy kept the parser from: that is not the page's error
      for (const error of errors.splice(0)) expect(error).toMatch(/Content Security Policy|404/);
    }));

  test("comes back with one click when its worker dies, the conversation kept", () =>
    tests.inPage(async (page, _context, errors) => {
      await setSampling(page);
      await openModel(page);
      await ask(page, "Once upon a time");
      await finished(page);
      await page.workers()[0].evaluate(() => {
        setTimeout(() => {
          throw new Error("the device was lost");
        });
      });
      await page.getByRole("alert").getByText("the device was lost").waitFor();
      await page.getByRole("button", { name: "Load the model again" }).click();
      await page.waitForSelector(".pill.on");
      expect(await answers(page).count()).toBe(1);
      await ask(page, " The end.");
      await expect.poll(() => page.locator(".stats").count(), { timeout: 15_000 }).toBe(2);
      errors.length = 0;
    }));

  test("comes back with one click when the GPU is lost, the conversation kept", () =>
    tests.inPage(
      async (page, _context, errors) => {
        await page.evaluate(() => {
          const chosen = { device: "webgpu", temperature: 0, repetitionPenalty: 1, maxTokens: 16 };
          localStorage.setItem("nibble-settings", JSON.stringify(chosen));
        });
        await page.reload();
        await page.getByRole("button", { name: "Open stories260K" }).first().waitFor();
        await expect.poll(() => page.workers().length).toBe(1);
        await page.workers()[0].evaluate(() => {
          const request = GPUAdapter.prototype.requestDevice;
          GPUAdapter.prototype.requestDevice = async function (this: GPUAdapter, descriptor) {
            const device = await request.call(this, descriptor);
            Object.assign(globalThis, { lose: () => device.destroy() });
            return device;
          };
        });
        await openModel(page);
        await ask(page, "Once upon a time");
        await finished(page);
        expect(await page.locator(".stats").textContent()).toMatch(/webgpu/);
        await page.workers()[0].evaluate(() => (globalThis as unknown as { lose(): void }).lose());
        await page.getByRole("alert").getByText("the browser lost the GPU").waitFor();
        await page.getByRole("button", { name: "Load the model again" }).click();
        await page.waitForSelector(".pill.on");
        expect(await answers(page).count()).toBe(1);
        await ask(page, " The end.");
        await expect.poll(() => page.locator(".stats").count(), { timeout: 40_000 }).toBe(2);
        errors.length = 0; // the worker's own
      },
      { flags: WEBGPU },
    ));

  test("a restored tab shows the conversation that it showed, its model open", () =>
    tests.inPage(async (page) => {
      await setSampling(page);
      await openModel(page);
      await ask(page, "Once upon a time");
      await finished(page);
      const said = await answers(page).locator(".body").textContent();
      await page.reload();
      await page.waitForSelector(".pill.on");
      expect(await answers(page).locator(".body").textContent()).toBe(said);
      // of no use to the next one: that is another tab
      expect(await page.evaluate(() => sessionStorage.getItem("nibble-conversation"))).toMatch(/^[\da-f-]{36}$/);
    }));

  test("is used with the keyboard alone", () =>
    tests.inPage(async (page) => {
      /** Tabs until something with this name has the focus. */
      const tabTo = async (name: RegExp) => {
        for (let i = 0; i < 40; i++) {
          await page.keyboard.press("Tab");
          const label = await page.evaluate(() => {
            const { activeElement: at } = document;
            return at?.getAttribute("aria-label") ?? at?.getAttribute("title") ?? at?.textContent ?? "";
          });
          if (name.test(label)) return;
        }
        throw new Error(`no way to ${name} by Tab`);
      };
      await tabTo(/^Open stories260K/);
      await page.keyboard.press("Enter");
      await page.waitForSelector(".pill.on");
      await page.keyboard.press("/");
      await page.keyboard.type("Once upon a time");
      await page.keyboard.press("Enter");
      await page.waitForSelector(".message[data-role=assistant]");
      await page.keyboard.press("Escape"); // stops
      await page.waitForSelector(".message[data-role=assistant] .foot:not([hidden])");
      await tabTo(/^Regenerate$/);
      expect(await page.evaluate(() => getComputedStyle(document.activeElement!).outlineStyle)).not.toBe("none");
      await page.keyboard.press("Enter");
      await page.keyboard.press("Escape");
      await tabTo(/^Settings$/);
      await page.keyboard.press("Enter");
      await page.getByRole("dialog", { name: "Settings" }).waitFor();
      await page.keyboard.press("Escape");
      expect(await page.getByRole("dialog").count()).toBe(0);
    }));

  test("runs under a sub-path of a host without isolation, on one thread, and says so", async () => {
    const plain = await startHost({ folders: { [SUBPATH]: tests.folder } });
    try {
      await withBrowser(async (context) => {
        const { page } = await openPage(context, plain.url + SUBPATH);
        await page.getByText("No WebGPU here (the browser offers no WebGPU adapter): models run on WASM.").waitFor();
        await page.getByText("The host sends no COOP and COEP headers").waitFor();
        await openModel(page);
        await ask(page, "Once upon a time");
        await finished(page);
        expect(await page.locator(".model-button").textContent()).toMatch(/WASM · 1 thread/);
      });
    } finally {
      await plain.close();
    }
  });

  test("has no accessibility errors in any view, light, dark and on a phone", () =>
    tests.inPage(
      async (page) => {
        await openModel(page);
        await ask(page, "Once upon a time");
        await finished(page);
        const problems: string[] = [];
        for (const theme of ["light", "dark"]) {
          for (const view of ["chat", "models", "compare", "quantize"]) {
            await page.goto(`${tests.host.url}/#${view}`);
            for (const problem of await axeViolations(page)) problems.push(`${theme} ${view}: ${problem}`);
          }
          await page.getByRole("button", { name: "Settings", exact: true }).click();
          for (const problem of await axeViolations(page)) problems.push(`${theme} settings: ${problem}`);
          await page.keyboard.press("Escape");
          await page.getByRole("button", { name: "Dark or light" }).click();
        }
        expect(problems).toEqual([]);
        const wider = await page.evaluate(() =>
          [...document.querySelectorAll("body *")]
            .filter((element) => element.getBoundingClientRect().right > innerWidth)
            .map((element) => `${element.tagName} ${element.className} ${element.textContent?.slice(0, 60)}`),
        );
        const fits = await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth);
        expect(fits ? [] : wider).toEqual([]);
        await page.goto(`${tests.host.url}/#chat`);
        await picture(page, "phone");
      },
      { width: 390, height: 800 },
    ));
});
