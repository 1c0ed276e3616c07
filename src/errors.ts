/** What kind of thing went wrong; the server maps these onto HTTP statuses in one place (`server/openai/errors.ts`). */
export type ErrorCode =
  | "bad_option" // the caller asked for something that cannot be
  | "bad_file" // a file's bytes contradict its format or its own header
  | "bad_config" // config.json says something unknown or impossible
  | "bad_weights" // a tensor is missing, has another shape than the config says, or holds NaN
  | "unsupported" // valid, but not something Nibble does
  | "not_found" // a file, tensor, model or hub revision that is not there
  | "no_space" // disk or memory is too small for what was asked
  | "network" // a download failed
  | "verification" // a result did not pass its own check
  | "context_length" // prompt plus answer do not fit the context
  | "overloaded" // the queue is full
  | "aborted" // the caller cancelled
  | "engine"; // the runtime or its worker died

/** The one error class: `message` says where, what was found, what is possible and what to do. */
export class NibbleError extends Error {
  override readonly name = "NibbleError";
  readonly code: ErrorCode;
  /** The option, request field or tensor at fault, where there is one. */
  readonly param: string | undefined;

  constructor(code: ErrorCode, message: string, options: { cause?: unknown; param?: string } = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.code = code;
    this.param = options.param;
  }
}
