/**
 * Orthogonal matrices of ±1 (Hadamard), also of sizes that are no power of two: Paley's two constructions (Paley 1933)
 * times Sylvester's doubling. 576 = 36 x 16, 896 = 28 x 32, 1536 = 12 x 128.
 */
import { NibbleError } from "../errors.ts";

/** A Hadamard matrix as (core ⊗ doubled): `core` (order, order) of ±1, then `doublings` times Sylvester's [1 1; 1 -1]. */
export interface Hadamard {
  readonly size: number;
  readonly core: Int8Array;
  readonly order: number;
  readonly doublings: number;
}

/** The construction with the smallest core; error `unsupported` where neither construction reaches the size. */
export function hadamard(size: number): Hadamard {
  let doublings = 0;
  while (Number.isInteger(size / 2 ** (doublings + 1))) doublings++;
  for (; doublings >= 0; doublings--) {
    const order = size / 2 ** doublings;
    const core = order === 1 ? Int8Array.of(1) : (paleyI(order) ?? paleyII(order));
    if (core) return { size, core, order, doublings };
  }
  throw new NibbleError(
    "unsupported",
    `No Hadamard matrix of size ${size} is known here (powers of two, times q + 1 for primes q = 3 mod 4 or 2q + 2 for primes q = 1 mod 4).`,
  );
}

/** Rows of x (rows, size) times H / sqrt(size), in place: m + log2 additions a number instead of a whole product. */
export function timesHadamard(x: Float64Array, { size, core, order, doublings }: Hadamard): void {
  const inner = 2 ** doublings;
  const column = new Float64Array(order);
  const factor = 1 / Math.sqrt(size);
  for (let row = 0; row < x.length; row += size) {
    for (let i = 0; order > 1 && i < inner; i++) {
      for (let j = 0; j < order; j++) column[j] = x[row + j * inner + i];
      for (let j = 0; j < order; j++) {
        let sum = 0;
        for (let k = 0; k < order; k++) sum += column[k] * core[k * order + j];
        x[row + j * inner + i] = sum;
      }
    }
    for (let half = 1; half < inner; half *= 2) {
      for (let start = row; start < row + size; start += 2 * half) {
        for (let i = start; i < start + half; i++) {
          const a = x[i];
          const b = x[i + half];
          x[i] = a + b;
          x[i + half] = a - b;
        }
      }
    }
    for (let i = row; i < row + size; i++) x[i] *= factor;
  }
}

/** Order q + 1, q a prime with q = 3 mod 4: I + S, S = [0 1; -1 Q] with Q[i, j] the quadratic character of i - j. */
function paleyI(order: number): Int8Array | undefined {
  const q = order - 1;
  if (q % 4 !== 3 || !isPrime(q)) return undefined;
  const character = quadraticCharacter(q);
  const H = new Int8Array(order * order);
  for (let i = 0; i < order; i++) {
    for (let j = 0; j < order; j++) {
      if (i === j) H[i * order + j] = 1;
      else if (i === 0) H[i * order + j] = 1;
      else if (j === 0) H[i * order + j] = -1;
      else H[i * order + j] = character[(i - j + q) % q];
    }
  }
  return H;
}

/** Order 2 (q + 1), q a prime with q = 1 mod 4: C = [0 1; 1 Q] symmetric, 0 becomes [1 -1; -1 -1] and ±1 ±[1 1; 1 -1]. */
function paleyII(order: number): Int8Array | undefined {
  const q = order / 2 - 1;
  if (q % 4 !== 1 || !isPrime(q)) return undefined;
  const character = quadraticCharacter(q);
  const H = new Int8Array(order * order);
  for (let i = 0; i <= q; i++) {
    for (let j = 0; j <= q; j++) {
      const c = i === j ? 0 : i === 0 || j === 0 ? 1 : character[(i - j + q) % q];
      const block = c === 0 ? [1, -1, -1, -1] : [c, c, c, -c];
      H[2 * i * order + 2 * j] = block[0];
      H[2 * i * order + 2 * j + 1] = block[1];
      H[(2 * i + 1) * order + 2 * j] = block[2];
      H[(2 * i + 1) * order + 2 * j + 1] = block[3];
    }
  }
  return H;
}

/** 1 for squares modulo q, -1 for the others, 0 for 0. */
function quadraticCharacter(q: number): Int8Array {
  const character = new Int8Array(q).fill(-1);
  character[0] = 0;
  for (let x = 1; x < q; x++) character[(x * x) % q] = 1;
  return character;
}

function isPrime(n: number): boolean {
  if (!Number.isInteger(n) || n < 2) return false;
  for (let d = 2; d * d <= n; d++) if (n % d === 0) return false;
  return true;
}
