import { expect, test } from "vitest";
import { formatDuration, Output, table } from "../../src/cli/output.ts";

function recorder(isTTY: boolean) {
  const writes: string[] = [];
  return { isTTY, columns: 100, writes, write: (text: string) => writes.push(text) };
}

const bytes = (done: number) => ({ stage: "download", done, total: 1000, unit: "bytes" as const });

test("on a terminal progress is one line with a bar, the rate and the time left", () => {
  let nowMs = 0;
  const stderr = recorder(true);
  const output = new Output({}, recorder(true), stderr, () => nowMs);
  output.progress(bytes(0));
  nowMs = 2000;
  output.progress(bytes(500));
  expect(stderr.writes.at(-1)).toBe("\r\x1b[2K[##########..........] download · 500 B of 1.0 kB · 250 B/s · 0:02 left");
});

test("elsewhere progress is plain lines, one a stage and one every five seconds", () => {
  let nowMs = 0;
  const stderr = recorder(false);
  const output = new Output({}, recorder(false), stderr, () => nowMs);
  for (nowMs = 0; nowMs <= 6000; nowMs += 100) output.progress(bytes(nowMs / 10));
  output.progress({ stage: "check", done: 0, total: 4, unit: "windows" });
  expect(stderr.writes.length).toBe(3);
  expect(stderr.writes.join("")).not.toContain("\r");
});

test("--json prints the result and nothing else", () => {
  const stdout = recorder(false);
  const stderr = recorder(false);
  const output = new Output({ json: true }, stdout, stderr);
  output.progress(bytes(1));
  output.note("a note");
  output.result("text", { answer: 42 });
  expect(stderr.writes).toEqual([]);
  expect(JSON.parse(stdout.writes.join(""))).toEqual({ answer: 42 });
});

test("durations and tables read as people write them", () => {
  expect([7, 750, 3723].map(formatDuration)).toEqual(["0:07", "12:30", "1:02:03"]);
  expect(
    table(
      ["name", "size"],
      [
        ["a", "10"],
        ["longer", "9"],
      ],
      [1],
    ),
  ).toBe("name    size\na         10\nlonger     9");
});
