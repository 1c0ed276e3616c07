/** Pruning as a step before rounding, or as all there is: what a recipe says of it, and one site's matrices by it. */
import type { MatrixProducts } from "../src/tensor/linalg.ts";
import { sparseGptMatrix } from "./sparsegpt.ts";
import type { Sparsity } from "./sparsity.ts";
import type { InputStatistics, Matrix } from "./types.ts";
import { wandaMatrix } from "./wanda.ts";

export const PRUNERS = ["wanda", "sparsegpt"] as const;

export interface Pruning {
  readonly method: (typeof PRUNERS)[number];
  readonly sparsity: Sparsity;
}

/** The matrices of one site, which share their inputs; without statistics by magnitude. */
export async function pruneMatrices(
  matrices: readonly Matrix[],
  { method, sparsity }: Pruning,
  statistics: InputStatistics | undefined,
  products: MatrixProducts,
): Promise<Matrix[]> {
  const pruned: Matrix[] = [];
  for (const matrix of matrices) {
    pruned.push(
      method === "sparsegpt" && statistics
        ? await sparseGptMatrix(matrix, sparsity, statistics, products)
        : wandaMatrix(matrix, sparsity, statistics),
    );
  }
  return pruned;
}
