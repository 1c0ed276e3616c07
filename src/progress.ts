/** One report of a long job; `done` and `total` count the same `unit`. */
export interface Progress {
  /** What is being done now: "quantize layer 3", "download model.safetensors". */
  readonly stage: string;
  readonly done: number;
  readonly total: number;
  readonly unit: "bytes" | "layers" | "tokens" | "windows" | "steps";
}

export type OnProgress = (progress: Progress) => void;
