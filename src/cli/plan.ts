/** The flags that give each matrix a format of its own, and the table that shows which. */
import { readFile, stat } from "node:fs/promises";
import { join } from "node:path";
import type { Command } from "commander";
import type { FittedPlan } from "../../quant/fit.ts";
import { formatName, type Plan, parsePlan } from "../../quant/plan.ts";
import type { Method } from "../../quant/recipes.ts";
import { NibbleError } from "../errors.ts";
import type { FitTarget } from "../node/fit.ts";
import { anyNumber, byteSize } from "./options.ts";
import { table } from "./output.ts";

export interface PlanFlags {
  readonly plan?: string;
  readonly fit?: number;
  readonly maxKl?: number;
  readonly bits?: number;
  readonly groupSize?: number | "row";
  readonly scaleBits?: number;
  readonly headBits?: number;
  readonly method?: Method;
}

export function withPlanFlags(command: Command): Command {
  return command
    .option(
      "--fit <size>",
      "choose each matrix's bits and groups so that graph and weights take at most this (80MB) and least is lost",
      byteSize,
    )
    .option("--max-kl <nats>", "choose them so that the mean KL stays below this in the fewest bytes", anyNumber)
    .option("--plan <file>", "take them from a plan.json or nibble.json that one of these made");
}

/** The target of --fit or --max-kl, or undefined; refuses flags that say the same thing twice. */
export function fitTargetOf(flags: PlanFlags): FitTarget | undefined {
  const { plan, fit, maxKl, bits, groupSize, scaleBits, headBits, method } = flags;
  const chosen = Object.entries({ "--plan": plan, "--fit": fit, "--max-kl": maxKl }).filter(([, value]) => value);
  const [[name] = []] = chosen;
  if (name === undefined) return undefined;
  const fixed = { "--bits": bits, "--group-size": groupSize, "--scale-bits": scaleBits };
  const other =
    chosen[1]?.[0] ??
    Object.entries(fixed).find(([, value]) => value !== undefined)?.[0] ??
    (headBits !== undefined && headBits !== 16 ? `--head-bits ${headBits}` : undefined) ??
    (method === "smoothquant" ? "--method smoothquant" : undefined);
  if (other !== undefined) {
    throw new NibbleError("bad_option", `${name} decides what ${other} would; give one of them.`, {
      param: name.slice(2),
    });
  }
  if (fit !== undefined) return { bytes: fit };
  if (maxKl === undefined) return undefined;
  if (maxKl > 0) return { maxKl };
  throw new NibbleError("bad_option", `--max-kl ${maxKl}: it has to be above 0.`, { param: "max-kl" });
}

/** The plan in a file, or in the folder of a model that was made by one. */
export async function readPlan(path: string): Promise<Plan> {
  try {
    const file = (await stat(path)).isDirectory() ? join(path, "nibble.json") : path;
    return parsePlan(file, await readFile(file, "utf8"));
  } catch (error) {
    if (error instanceof NibbleError) throw error;
    throw new NibbleError("not_found", `--plan ${path} cannot be read: ${(error as Error).message}`, {
      cause: error,
      param: "plan",
    });
  }
}

/** One line a layer, one column a site: "4g32s8" is 4 bits in groups of 32 with 8-bit scales. */
export function planTable(plan: Plan): string {
  const last = (name: string) => name.slice(name.lastIndexOf(".") + 1);
  const layerOf = (name: string) => /^(.*?\.\d+)\./.exec(name)?.[1] ?? "ends";
  const rows = new Map<string, Map<string, string>>();
  for (const [name, format] of Object.entries(plan)) {
    const row = rows.get(layerOf(name)) ?? new Map<string, string>();
    rows.set(layerOf(name), row.set(last(name), formatName(format)));
  }
  const shown = [...rows].filter(([at]) => at !== "ends");
  const columns = [...new Set(shown.flatMap(([, row]) => [...row.keys()]))];
  const body = shown.map(([at, row]) => [last(at), ...columns.map((column) => row.get(column) ?? "")]);
  const ends = [...(rows.get("ends") ?? [])].map(([name, format]) => `${name} ${format}`);
  return [table(["layer", ...columns], body, [0]), ...ends].join("\n");
}

export function fittedLine({ sizeBytes, expectedKl }: FittedPlan): string {
  return `plan: ${(sizeBytes / 1e6).toFixed(2)} MB to run, expected KL about ${expectedKl.toPrecision(2)}`;
}
