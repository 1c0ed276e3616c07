/**
 * What a command says: results on stdout (text, or one JSON document with --json), everything else on stderr:
 * a bar on a terminal, plain lines elsewhere, nothing with --json or --quiet.
 */
import { formatBytes } from "../node/memory.ts";
import type { OnProgress, Progress } from "../progress.ts";

export interface OutputFlags {
  readonly json?: boolean;
  readonly quiet?: boolean;
}

export interface Terminal {
  readonly isTTY?: boolean;
  readonly columns?: number;
  write(text: string): unknown;
}

const REDRAW_MS = 100; // fast enough to look alive, slow enough not to cost
const PLAIN_MS = 5000; // a line in a log every few seconds

export class Output {
  private readonly progressState = new ProgressClock();
  private lastDrawMs = 0;
  private lastStage = "";
  private barShown = false;

  constructor(
    private readonly flags: OutputFlags,
    private readonly stdout: Terminal = process.stdout,
    private readonly stderr: Terminal = process.stderr,
    private readonly now: () => number = Date.now,
  ) {}

  get silent(): boolean {
    return Boolean(this.flags.json || this.flags.quiet);
  }

  /** What the command is for: `text` for people, `data` for --json. */
  result(text: string, data: unknown): void {
    this.clearBar();
    if (this.flags.json) this.stdout.write(`${JSON.stringify(data, typedArraysAsLists, 2)}\n`);
    else this.stdout.write(text.endsWith("\n") || text === "" ? text : `${text}\n`);
  }

  /** Worth knowing, but not the result. */
  note(text: string): void {
    if (this.silent) return;
    this.clearBar();
    this.stderr.write(`${text}\n`);
  }

  readonly progress: OnProgress = (progress) => {
    if (this.silent) return;
    const nowMs = this.now();
    const line = this.progressState.describe(progress, nowMs);
    const finished = progress.done >= progress.total;
    const stage = progress.stage.replace(/\d+/g, ""); // layers of one walk are one stage
    if (this.stderr.isTTY) {
      if (nowMs - this.lastDrawMs < REDRAW_MS && !finished) return;
      const width = (this.stderr.columns ?? 80) - 1;
      this.stderr.write(`\r\x1b[2K${line.slice(0, width)}`);
      this.barShown = true;
    } else {
      if (stage === this.lastStage && nowMs - this.lastDrawMs < PLAIN_MS) return;
      this.stderr.write(`${line}\n`);
    }
    this.lastDrawMs = nowMs;
    this.lastStage = stage;
  };

  clearBar(): void {
    if (this.barShown) this.stderr.write("\r\x1b[2K");
    this.barShown = false;
  }
}

function typedArraysAsLists(_key: string, value: unknown): unknown {
  return ArrayBuffer.isView(value) && !(value instanceof DataView) ? Array.from(value as Float32Array) : value;
}

/** Rate and time left since the counting of this unit began. */
class ProgressClock {
  private startMs = 0;
  private startDone = 0;
  private unit = "";
  private total = -1;
  private lastDone = 0;

  describe({ stage, done, total, unit }: Progress, nowMs: number): string {
    if (unit !== this.unit || total !== this.total || done < this.lastDone) {
      Object.assign(this, { unit, total, startMs: nowMs, startDone: done });
    }
    this.lastDone = done;
    const share = total > 0 ? Math.min(1, done / total) : 0;
    const filled = Math.round(share * 20);
    const counts = unit === "bytes" ? `${formatBytes(done)} of ${formatBytes(total)}` : `${done} of ${total} ${unit}`;
    const seconds = (nowMs - this.startMs) / 1000;
    const rate = seconds > 0 ? (done - this.startDone) / seconds : 0;
    let pace = "";
    if (rate > 0 && done < total) {
      const perSecond = unit === "bytes" ? formatBytes(rate) : rate.toFixed(rate < 10 ? 2 : 0);
      pace = ` · ${perSecond}/s · ${formatDuration((total - done) / rate)} left`;
    }
    return `[${"#".repeat(filled)}${".".repeat(20 - filled)}] ${stage} · ${counts}${pace}`;
  }
}

/** "0:07", "12:30", "1:02:03" */
export function formatDuration(seconds: number): string {
  const whole = Math.max(0, Math.round(seconds));
  const parts = [Math.floor(whole / 60) % 60, whole % 60].map((n) => String(n).padStart(2, "0"));
  const hours = Math.floor(whole / 3600);
  return hours > 0 ? `${hours}:${parts.join(":")}` : `${Number(parts[0])}:${parts[1]}`;
}

/** Rows under headers, columns padded to their widest cell; the columns named in `right` are right-aligned. */
export function table(
  headers: readonly string[],
  rows: readonly (readonly string[])[],
  right: readonly number[] = [],
): string {
  const widths = headers.map((header, col) => Math.max(header.length, ...rows.map((row) => row[col].length)));
  const line = (row: readonly string[]) =>
    row
      .map((cell, col) => (right.includes(col) ? cell.padStart(widths[col]) : cell.padEnd(widths[col])))
      .join("  ")
      .trimEnd();
  return [headers, ...rows].map(line).join("\n");
}
