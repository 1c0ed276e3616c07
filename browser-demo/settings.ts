/** What the user chose, kept in localStorage. */
import type { DeviceWish } from "../src/web/device.ts";
import { Signal } from "./ui/dom.ts";

export interface Settings {
  readonly theme: "system" | "light" | "dark";
  readonly device: DeviceWish;
  /** Where answers are made; `auto` is the server where one shows this page. */
  readonly runOn: "auto" | "page" | "server";
  /** Which of the server's models, where it has several. */
  readonly servedModel: string;
  readonly system: string;
  readonly temperature: number;
  readonly topK: number;
  readonly topP: number;
  readonly minP: number;
  readonly repetitionPenalty: number;
  readonly maxTokens: number;
  /** Empty: a new one each time. */
  readonly seed: string;
  /** Tokens of prompt and answer; 0: the model's own. */
  readonly context: number;
  /** Opened again on the next visit. */
  readonly lastModel: string;
  /** The note on what this browser lacks, once it was read. */
  readonly dismissed: string;
}

export const defaults: Settings = {
  theme: "system",
  device: "auto",
  runOn: "auto",
  servedModel: "",
  system: "",
  temperature: 0.7,
  topK: 40,
  topP: 0.95,
  minP: 0.05,
  repetitionPenalty: 1.1,
  maxTokens: 512,
  seed: "",
  context: 0,
  lastModel: "",
  dismissed: "",
};

const KEY = "nibble-settings";

function read(): Settings {
  try {
    return { ...defaults, ...(JSON.parse(localStorage.getItem(KEY) ?? "{}") as Partial<Settings>) };
  } catch {
    return defaults; // storage is off, or holds something that is not ours
  }
}

export const settings = new Signal<Settings>(read());

export function change(part: Partial<Settings>): void {
  settings.value = { ...settings.value, ...part };
  try {
    localStorage.setItem(KEY, JSON.stringify(settings.value));
  } catch {
    // Storage is off: the choice holds until the page closes.
  }
}

const darkSystem = matchMedia("(prefers-color-scheme: dark)");

function applyTheme(): void {
  const { theme } = settings.value;
  const dark = theme === "dark" || (theme === "system" && darkSystem.matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

darkSystem.addEventListener("change", applyTheme);
settings.watch(applyTheme);
