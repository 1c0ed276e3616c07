/** Before something is measured: engines move their memory onto huge pages once they are loaded, where nothing else runs. */
import { setTimeout as pause } from "node:timers/promises";

const LOOK_MS = 500;
const LONGEST_MS = 60_000;
/** Of one core. */
const IDLE_SHARE = 0.05;

/** Resolves when this process hardly computes any more, or after a minute. */
export async function atRest(): Promise<void> {
  for (let waited = 0, share = 1; share > IDLE_SHARE && waited < LONGEST_MS; waited += LOOK_MS) {
    const before = process.cpuUsage();
    await pause(LOOK_MS);
    const { user, system } = process.cpuUsage(before);
    share = (user + system) / 1000 / LOOK_MS;
  }
}
