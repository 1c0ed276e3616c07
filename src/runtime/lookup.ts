/**
 * Prompt lookup decoding (Saxena 2023; transformers' prompt_lookup_num_tokens): the tokens that followed the last
 * n-gram when it occurred before are a guess at what follows now. Verified in one step, it changes the speed only:
 * each position is sampled from the model's own distribution, and the first token that differs ends the guess.
 */

/** Longest n-gram looked for first; one of 2 already repeats by chance. */
const NGRAM_SIZES = [4, 3, 2] as const;

/** Up to `count` tokens that followed the text's end where it occurred before: the latest place with so many of them. */
export function lookUp(tokens: readonly number[], count: number): number[] {
  const end = tokens.length;
  for (const size of NGRAM_SIZES) {
    let longest = 0; // of places near the end, where a repetition overlaps itself
    let found = -1;
    for (let at = end - size - 1; at >= 0 && longest < count; at--) {
      let same = true;
      for (let i = 0; i < size && same; i++) same = tokens[at + i] === tokens[end - size + i];
      const follows = Math.min(count, end - at - size);
      if (!same || follows <= longest) continue;
      longest = follows;
      found = at + size;
    }
    if (found >= 0) return tokens.slice(found, found + longest);
  }
  return [];
}

/** Verifying 4 costs 1.4 to 1.5 steps on a CPU (context 512), 8 costs two. */
export const GUESS_TOKENS = 4;
/** What a try is taken to gain, in tokens, before anything is known; after a pause one bad try is enough. */
const OPTIMISM = 0.5;
/** Steps without a guess after guesses stopped paying; doubles each time, up to the maximum. */
const FIRST_PAUSE = 8;
const LONGEST_PAUSE = 256;

/** Whether one kind of guess pays for one sequence. */
export class GuessGauge {
  /** Tokens that a try gains over plain steps of the same time, moving mean. */
  private gain = OPTIMISM;
  private pauseLeft = 0;
  private pause = FIRST_PAUSE;

  get wantsGuess(): boolean {
    if (this.pauseLeft === 0) return true;
    this.pauseLeft--;
    return false;
  }

  /** A try gave `accepted` tokens and the one that every step gives; it cost so many plain steps beyond one. */
  tried(accepted: number, cost: number): void {
    this.gain = 0.7 * this.gain + 0.3 * (accepted - cost);
    if (accepted > cost) this.pause = FIRST_PAUSE;
    if (this.gain >= 0) return;
    this.pauseLeft = this.pause;
    this.pause = Math.min(2 * this.pause, LONGEST_PAUSE);
    this.gain = 0;
  }
}
