/** Models in the page: arriving, refused, kept, used offline and by the page's own /v1. */
import { readFileSync } from "node:fs";
import type { Page } from "playwright-core";
import { describe, expect, test } from "vitest";
import { LIMIT_MS, noChromium, openPage } from "./chromium.ts";
import { answers, ask, composer, finished, openModel, picture, servedForTests, setSampling } from "./driving.ts";
import { tagOf } from "./host.ts";

/** Of a file of stories260K, as far as it has arrived. */
function storedBytes(page: Page, path: string): Promise<number> {
  return page.evaluate(
    async (parts) => {
      try {
        let folder = await navigator.storage.getDirectory();
        for (const part of parts.slice(0, -1)) folder = await folder.getDirectoryHandle(part);
        return (await (await folder.getFileHandle(parts.at(-1)!)).getFile()).size;
      } catch {
        return 0;
      }
    },
    ["models", "stories260k", "files", ...path.split("/")],
  );
}

describe.skipIf(noChromium())("models in the page", { timeout: LIMIT_MS + 30_000 }, () => {
  const tests = servedForTests();

  test("works offline on the second visit, with the model it had", () =>
    tests.inPage(async (page, context) => {
      await setSampling(page);
      await openModel(page);
      await ask(page, "Once upon a time");
      await finished(page);
      const online = await answers(page).locator(".body").textContent();
      await expect
        .poll(() => page.evaluate(async () => (await (await caches.open("nibble-runtime")).keys()).length))
        .toBe(2);
      await page.close();
      tests.host.down = true;
      const { page: again } = await openPage(context, `${tests.host.url}/`);
      await again.getByText("stories260k", { exact: true }).first().waitFor();
      await again.waitForSelector(".pill.on");
      await ask(again, "Once upon a time");
      await finished(again);
      expect(await answers(again).locator(".body").textContent()).toBe(online);
    }));

  test("answers a page's own fetch of /v1, and 503 while no model is open", () =>
    tests.inPage(async (page, _context, errors) => {
      await expect
        .poll(() => page.evaluate(() => navigator.serviceWorker.controller !== null), { timeout: 10_000 })
        .toBe(true);
      const post = () =>
        page.evaluate(async () => {
          const body = {
            model: "stories260k",
            messages: [{ role: "user", content: "Once" }],
            max_tokens: 8,
          };
          const headers = { "Content-Type": "application/json" };
          const response = await fetch("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body) });
          return { status: response.status, body: await response.json() };
        });
      expect(await post()).toMatchObject({ status: 503, body: { error: { code: "no_engine" } } });
      errors.length = 0; // the browser logs that answer
      await openModel(page);
      await page.waitForSelector(".pill.on");
      const answer = await post();
      expect(answer).toMatchObject({
        status: 200,
        body: { object: "chat.completion", model: "stories260k", usage: { completion_tokens: 8 } },
      });
      const models = await page.evaluate(async () => (await fetch("/v1/models")).json());
      expect(models.data).toMatchObject([{ id: "stories260k" }]);
    }));

  test("answers fetch of /v1 in any page of the site, and 503 when the one with the engine is closed", () =>
    tests.inPage(async (page, context) => {
      await openModel(page);
      const other = await context.newPage();
      await other.goto(`${tests.host.url}/icon.svg`); // none of Nibble's code
      const models = () =>
        other.evaluate(async () => {
          const answer = await fetch("/v1/models");
          return { status: answer.status, body: await answer.json() };
        });
      expect(await models()).toMatchObject({ status: 200, body: { data: [{ id: "stories260k" }] } });
      // some 12 seconds of answers, of which the first begin before the page is closed
      const body = { model: "stories260k", prompt: "Once", max_tokens: 400, ignore_eos: true, n: 16, stream: true };
      const reading = other.evaluateHandle(async (body) => {
        const headers = { "Content-Type": "application/json" };
        const answer = await fetch("/v1/completions", { method: "POST", headers, body: JSON.stringify(body) });
        const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
        const first = (await reader.read()).value ?? "";
        const rest = (async () => {
          let text = "";
          for (let part = await reader.read(); !part.done; part = await reader.read()) text += part.value;
          return text;
        })();
        return { first, rest };
      }, body);
      expect(await (await reading).evaluate(({ first }) => first)).toContain("data: ");
      await page.close();
      const rest = await (await reading).evaluate(({ rest }) => rest);
      expect(rest).toContain(`"code":"engine_error"`);
      expect(rest).not.toContain("[DONE]");
      expect(await models()).toMatchObject({ status: 503, body: { error: { code: "no_engine" } } });
    }));

  test("goes on with a download that was stopped, from the byte where it stopped", () =>
    tests.inPage(async (page) => {
      let cut = 0;
      tests.host.intercept = (path, request, response, file) => {
        if (!path.endsWith(".onnx_data") || request.headers.range) return false;
        const bytes = readFileSync(file);
        cut = Math.floor(bytes.byteLength / 2);
        response.setHeader("ETag", tagOf(file));
        response.setHeader("Content-Length", bytes.byteLength);
        response.write(bytes.subarray(0, cut)); // and then nothing
        return true;
      };
      await page.getByRole("button", { name: "Open stories260K" }).first().click();
      await expect.poll(() => storedBytes(page, "onnx/model_q4.onnx_data"), { timeout: 30_000 }).toBeGreaterThan(0);
      await page.getByRole("button", { name: "Stop" }).click();
      await page.goto(`${tests.host.url}/#models`);
      await page.locator("small", { hasText: /\d+ kB of \d+ kB/ }).waitFor();
      await page.getByRole("button", { name: "Resume" }).click();
      await page.waitForSelector(".pill.on");
      const ranges = tests.host.log.flatMap((line) => /onnx_data bytes=(\d+)-$/.exec(line)?.[1] ?? []).map(Number);
      expect(ranges).toHaveLength(1);
      expect(ranges[0]).toBeGreaterThan(0);
      expect(ranges[0]).toBeLessThanOrEqual(cut); // of what was sent, as much as had arrived
      await page.getByText("Verified").waitFor();
    }));

  test("lists what was computed of prompts, and forgets it with a conversation", () =>
    tests.inPage(async (page) => {
      await setSampling(page);
      await openModel(page);
      const long = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park.";
      const says = async () => {
        await ask(page, long);
        await finished(page);
      };
      await says();
      const kept = async () => {
        await page.goto(`${tests.host.url}/#chat`);
        await page.goto(`${tests.host.url}/#models`); // asks again
        return page.getByText(/ of prompts/).count();
      };
      await expect.poll(kept).toBe(1);
      await page.getByRole("button", { name: "Forget prompts" }).click();
      await page.getByText(/ of prompts/).waitFor({ state: "detached" });
      await page.goto(`${tests.host.url}/#chat`);
      await page.getByRole("button", { name: "New chat" }).click();
      await says();
      await expect.poll(kept).toBe(1);
      await page
        .getByRole("button", { name: /^Delete conversation/ })
        .first()
        .click();
      await page.getByText(/ of prompts/).waitFor({ state: "detached" });
    }));

  test("refuses a model that cannot fit with both numbers, before its weights are asked for", () =>
    tests.inPage(async (page) => {
      tests.host.intercept = (path, _request, response, file) => {
        if (!path.endsWith("stories260k/nibble.json")) return false;
        const manifest = JSON.parse(readFileSync(file, "utf8"));
        manifest.files["onnx/model_q4.onnx_data"].sizeBytes = 3e9;
        response.setHeader("Content-Type", "application/json");
        response.end(JSON.stringify(manifest));
        return true;
      };
      tests.host.log.length = 0;
      await page.getByRole("button", { name: "Open stories260K" }).first().click();
      const alert = page.getByRole("alert");
      await alert.getByText(/needs [\d,]+ bytes of .*; there are [\d,]+/).waitFor();
      expect(tests.host.log.filter((line) => line.includes("onnx_data"))).toEqual([]);
      tests.host.intercept = undefined;
      await page.getByRole("button", { name: "Try again" }).click();
      await page.waitForSelector(".pill.on");
    }));

  test("shows one bar while a model arrives, and asks it what was sent meanwhile", () =>
    tests.inPage(async (page) => {
      // Half of it in pieces, so that there is a rate; the rest when the picture is taken.
      let finish: () => void = () => undefined;
      tests.host.intercept = (path, _request, response, file) => {
        if (!path.endsWith(".onnx_data")) return false;
        const bytes = readFileSync(file);
        response.setHeader("Content-Length", bytes.byteLength);
        const pieces = 8;
        let sent = 0;
        const send = (share: number) => {
          const end = Math.floor(bytes.byteLength * share);
          response.write(bytes.subarray(sent, end));
          sent = end;
        };
        for (let i = 1; i <= pieces; i++) setTimeout(() => send(i / pieces / 2), i * 100);
        finish = () => response.end(bytes.subarray(sent));
        return true;
      };
      await page.getByText("Nothing you type leaves this page").first().waitFor();
      await ask(page, "Lily and Tom");
      await page.locator(".status", { hasText: "Open a model first: nothing was sent" }).waitFor();
      await page.getByRole("button", { name: "Open stories260K" }).first().click();
      await composer(page).press("Enter");
      await page.locator(".status", { hasText: "Sent as soon as the model is ready" }).waitFor();
      const bar = page.getByRole("progressbar", { name: "Loading the model" });
      await expect.poll(async () => Number(await bar.getAttribute("value")), { timeout: 10_000 }).toBeGreaterThan(0.3);
      await page.getByText(/kB\/s/).waitFor();
      expect(await page.locator(".download").textContent()).toMatch(/\d+ kB of \d+ kB/);
      await picture(page, "download");
      finish();
      await page.waitForSelector(".pill.on");
      expect(await bar.isVisible()).toBe(false);
      tests.host.intercept = undefined;
      await page.getByRole("article", { name: "You" }).getByText("Lily and Tom").waitFor();
      await finished(page);
      await page.goto(`${tests.host.url}/#models`);
      await page.getByText("Verified").waitFor();
      await page.getByRole("button", { name: "Delete stories260k" }).click();
      await page.getByText("Nothing stored yet.").waitFor();
    }));
});
