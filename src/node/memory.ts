/** What a model will take beside what the machine has, before anything is loaded. */
import { readFileSync } from "node:fs";
import { freemem } from "node:os";
import { NibbleError } from "../errors.ts";

export interface MemoryNeed {
  readonly weightBytes: number;
  readonly kvBytesPerToken: number;
  /** What a cache takes whatever its length. */
  readonly kvFixedBytes?: number;
  /** Tokens of prompt and answer together. */
  readonly contextLength: number;
}

export interface MemoryEstimate extends MemoryNeed {
  readonly kvBytes: number;
  /** Weights and KV cache; activations and the runtime itself come on top. */
  readonly totalBytes: number;
  /** What this process may still take: the machine's free memory, or less where a cgroup limits it. */
  readonly availableBytes: number;
  readonly fits: boolean;
}

type ReadFile = (path: string) => string;

function readOrEmpty(read: ReadFile, path: string): string {
  try {
    return read(path);
  } catch {
    return ""; // not Linux, or this kernel has another cgroup version
  }
}

/** Bytes of a `name value` line ("inactive_file 4096") or a `Name:  value kB` line. */
function field(text: string, name: string): number | undefined {
  const match = new RegExp(`^${name}:?\\s+(\\d+)( kB)?$`, "m").exec(text);
  return match ? Number(match[1]) * (match[2] ? 1024 : 1) : undefined;
}

/** limit - usage + what the kernel gives back (page cache not in use), for this cgroup and every one above it. */
function cgroupHeadroom(read: ReadFile): number {
  const memberships = readOrEmpty(read, "/proc/self/cgroup");
  const unified = /^0::(\/.*)$/m.exec(memberships)?.[1];
  const legacy = /^\d+:(?:[^:]*,)?memory(?:,[^:]*)?:(\/.*)$/m.exec(memberships)?.[1];
  const roots = [
    { base: "/sys/fs/cgroup", path: unified, limit: "memory.max", usage: "memory.current" },
    { base: "/sys/fs/cgroup/memory", path: legacy, limit: "memory.limit_in_bytes", usage: "memory.usage_in_bytes" },
  ];
  let headroom = Number.POSITIVE_INFINITY;
  for (const { base, path, limit, usage } of roots) {
    if (path === undefined) continue;
    // a container sees its own group as "/", but may be told its path outside: both are tried
    for (let at = path; ; at = at.slice(0, at.lastIndexOf("/"))) {
      const folder = `${base}${at === "/" ? "" : at}`;
      const max = Number.parseInt(readOrEmpty(read, `${folder}/${limit}`), 10); // "max" -> NaN
      const used = Number.parseInt(readOrEmpty(read, `${folder}/${usage}`), 10);
      const reclaimable = field(readOrEmpty(read, `${folder}/memory.stat`), "inactive_file") ?? 0;
      if (Number.isFinite(max) && Number.isFinite(used)) headroom = Math.min(headroom, max - used + reclaimable);
      if (at === "" || at === "/") break;
    }
  }
  return headroom;
}

/** Bytes that this process may still take without swapping or being killed. */
export function availableMemory(read: ReadFile = (path) => readFileSync(path, "utf8")): number {
  const machine = field(readOrEmpty(read, "/proc/meminfo"), "MemAvailable") ?? freemem();
  return Math.max(0, Math.min(machine, cgroupHeadroom(read)));
}

export function estimateMemory(need: MemoryNeed, availableBytes = availableMemory()): MemoryEstimate {
  const kvBytes = need.kvBytesPerToken * need.contextLength + (need.kvFixedBytes ?? 0);
  const totalBytes = need.weightBytes + kvBytes;
  return { ...need, kvBytes, totalBytes, availableBytes, fits: totalBytes <= availableBytes };
}

/** "86.3 MB": decimal units, as disks and downloads count. */
export function formatBytes(bytes: number): string {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  let value = bytes;
  for (; Math.abs(value) >= 999.5 && unit < units.length - 1; unit++) value /= 1000;
  return `${unit === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}

/** One line for people: what loading takes and what there is. */
export function describeMemory(estimate: MemoryEstimate): string {
  const { weightBytes, kvBytes, contextLength, totalBytes, availableBytes } = estimate;
  return (
    `memory: ${formatBytes(totalBytes)} (weights ${formatBytes(weightBytes)}, KV cache ${formatBytes(kvBytes)} at ` +
    `${contextLength} tokens) of ${formatBytes(availableBytes)} available`
  );
}

/** Refuses a model that cannot fit, with the context that would. */
export function requireMemory(name: string, estimate: MemoryEstimate): void {
  if (estimate.fits) return;
  const { weightBytes, availableBytes, kvBytesPerToken, kvFixedBytes = 0 } = estimate;
  const tokens = kvBytesPerToken > 0 ? Math.floor((availableBytes - weightBytes - kvFixedBytes) / kvBytesPerToken) : 0;
  throw new NibbleError(
    "no_space",
    `${name} does not fit: ${describeMemory(estimate)}. ` +
      (tokens >= 16 ? `A context of ${tokens} tokens fits: --context ${tokens}.` : "A smaller model is needed."),
    { param: "context" },
  );
}
