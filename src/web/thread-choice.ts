/**
 * How many WASM threads pay, told by what answers took here. ONNX Runtime's threads wait for each other at every node,
 * spinning: where another program holds a core the second thread makes every node as slow as that core, and one thread is
 * faster. SmolLM2 in Chromium on two cores, ms a token: 31 on one thread, 23 on two; with both cores taken 33 and 61.
 */

/** What one answer took. */
export interface AnswerSpeed {
  /** Median of its steps of one token. */
  readonly stepMs: number;
  /** Median of steps over the fastest of their neighbours: about 1.1 where threads have their cores to themselves. */
  readonly unevenness: number;
  /** Milliseconds since 1970. */
  readonly at: number;
}

/** The last answer by number of threads. */
export type AnswerSpeeds = Readonly<Record<number, AnswerSpeed>>;

/** Above this, threads wait for a core that something else holds. */
const UNEVEN = 1.6;
/** What held a core yesterday says nothing. */
const FORGET_MS = 24 * 3600 * 1000;
/** Fewer steps tell nothing. */
const FEWEST_STEPS = 16;
const NEIGHBOURS = 4;

/** Undefined for an answer that was too short. @param steps ms of each step of one token, in order */
export function speedOf(steps: readonly number[], now: number): AnswerSpeed | undefined {
  if (steps.length < FEWEST_STEPS) return undefined;
  const near = steps.map((step, i) => step / Math.min(...steps.slice(Math.max(0, i - NEIGHBOURS), i + NEIGHBOURS + 1)));
  return { stepMs: median(steps), unevenness: median(near), at: now };
}

/** @param most what the cores allow */
export function threadsThatPay(most: number, speeds: AnswerSpeeds, now: number): number {
  const lately = (threads: number) => {
    const speed = speeds[threads];
    return speed && now - speed.at < FORGET_MS ? speed : undefined;
  };
  const many = lately(most);
  if (most === 1 || !many || many.unevenness <= UNEVEN) return most;
  const one = lately(1);
  return !one || one.stepMs < many.stepMs ? 1 : most;
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1];
}
