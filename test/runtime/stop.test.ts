import fc from "fast-check";
import { expect, test } from "vitest";
import { StopStrings } from "../../src/runtime/stop.ts";

test("a stop string across pieces ends the text before it", () => {
  const stops = new StopStrings(["END"]);
  expect(stops.push("abc E")).toEqual({ text: "abc " });
  expect(stops.push("N")).toEqual({ text: "" });
  expect(stops.push("D and more")).toEqual({ text: "", stopString: "END" });
});

test("text held back for a stop string that did not come is given out", () => {
  const stops = new StopStrings(["END"]);
  stops.push("E");
  expect(stops.push("Nough")).toEqual({ text: "ENough" });
  stops.push("x EN");
  expect(stops.end()).toBe("EN");
});

test("however text is cut, what comes out is the text before the earliest stop string", () => {
  fc.assert(
    fc.property(
      fc.array(fc.string({ unit: fc.constantFrom("a", "b", "c") }), { maxLength: 12 }),
      fc.array(fc.string({ unit: fc.constantFrom("a", "b", "c"), minLength: 1, maxLength: 4 }), { maxLength: 3 }),
      (pieces, stops) => {
        const whole = pieces.join("");
        const places = stops.map((stop) => whole.indexOf(stop)).filter((at) => at >= 0);
        const one = new StopStrings(stops);
        let out = "";
        let stopped = false;
        for (const piece of pieces) {
          const { text, stopString } = one.push(piece);
          out += text;
          if (stopString !== undefined) {
            stopped = true;
            break;
          }
        }
        if (!stopped) out += one.end();
        expect(stopped).toBe(places.length > 0);
        // A longer stop string that starts earlier may still be open when a shorter one inside it is whole.
        if (!stopped) expect(out).toBe(whole);
        else expect(whole.startsWith(out)).toBe(true);
        for (const stop of stops) expect(out.includes(stop)).toBe(false);
      },
    ),
  );
});
