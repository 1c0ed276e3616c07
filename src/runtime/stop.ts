/** Stop strings in a stream: text that could be the start of one is held back until it is decided. */

export interface Released {
  /** Text that is certain. */
  readonly text: string;
  /** The stop string that appeared, which is not part of the text. */
  readonly stopString?: string;
}

export class StopStrings {
  private held = "";
  private readonly stops: readonly string[];

  constructor(stops: readonly string[] = []) {
    this.stops = stops.filter((stop) => stop.length > 0);
  }

  /** Takes new text; the earliest stop string wins, the longer one at the same place. */
  push(text: string): Released {
    const all = this.held + text;
    let at = Number.POSITIVE_INFINITY;
    let found: string | undefined;
    for (const stop of this.stops) {
      const place = all.indexOf(stop);
      if (place >= 0 && (place < at || (place === at && stop.length > (found?.length ?? 0)))) {
        at = place;
        found = stop;
      }
    }
    if (found !== undefined) {
      this.held = "";
      return { text: all.slice(0, at), stopString: found };
    }
    const keep = this.undecided(all);
    this.held = all.slice(all.length - keep);
    return { text: all.slice(0, all.length - keep) };
  }

  /** What was held back, at the end of the stream. */
  end(): string {
    const rest = this.held;
    this.held = "";
    return rest;
  }

  /** Length of the longest end of `text` that a stop string begins with. */
  private undecided(text: string): number {
    let longest = 0;
    for (const stop of this.stops) {
      for (let length = Math.min(stop.length - 1, text.length); length > longest; length--) {
        if (text.endsWith(stop.slice(0, length))) longest = length;
      }
    }
    return longest;
  }
}
