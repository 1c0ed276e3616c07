/** Every error an answer can carry, in OpenAI's shape; the one place where codes become HTTP statuses. */
import type { core, ZodError } from "zod";
import { type ErrorCode, NibbleError } from "../../src/errors.ts";

export interface ErrorBody {
  readonly error: {
    readonly message: string;
    readonly type: string;
    readonly param: string | null;
    readonly code: string | null;
  };
}

export interface HttpError {
  readonly status: number;
  readonly body: ErrorBody;
  /** In whole seconds, for Retry-After. */
  readonly retryAfterSeconds?: number;
  /** What went wrong is the server's, so its log gets the full text. */
  readonly internal: boolean;
}

/** An error with an HTTP status and an OpenAI code of its own. */
export class ApiError extends NibbleError {
  readonly status: number;
  readonly apiCode: string | null;
  readonly retryAfterSeconds: number | undefined;

  constructor(
    status: number,
    apiCode: string | null,
    message: string,
    options: { param?: string; retryAfterSeconds?: number; code?: ErrorCode } = {},
  ) {
    super(options.code ?? "bad_option", message, { param: options.param });
    this.status = status;
    this.apiCode = apiCode;
    this.retryAfterSeconds = options.retryAfterSeconds;
  }
}

/** A field that is known and refused, or that nobody knows. */
export function refuse(param: string, message: string, apiCode = "unsupported_parameter"): ApiError {
  return new ApiError(400, apiCode, message, { param, code: "unsupported" });
}

export function badValue(param: string, message: string): ApiError {
  return new ApiError(400, "invalid_value", message, { param });
}

/** As OpenAI words it, with both numbers. */
export function contextLengthError(param: string, contextLength: number, promptTokens: number): ApiError {
  const what = param === "messages" ? "your messages" : "your prompt";
  return new ApiError(
    400,
    "context_length_exceeded",
    `This model's maximum context length is ${contextLength} tokens. However, ${what} resulted in ${promptTokens} ` +
      `tokens. Please reduce the length of the ${param === "messages" ? "messages" : "prompt"}.`,
    { param, code: "context_length" },
  );
}

const INVALID = "invalid_request_error";
const SERVER = "server_error";

/** `internal`: the message may name paths of the server, so the client gets `generic` and the log the rest. */
const byCode: Readonly<
  Record<ErrorCode, { status: number; type: string; code: string | null; generic?: string; retryAfterSeconds?: number }>
> = {
  bad_option: { status: 400, type: INVALID, code: "invalid_value" },
  unsupported: { status: 400, type: INVALID, code: "unsupported_value" },
  context_length: { status: 400, type: INVALID, code: "context_length_exceeded" },
  not_found: { status: 404, type: INVALID, code: "not_found" },
  overloaded: { status: 503, type: SERVER, code: "overloaded", retryAfterSeconds: 1 },
  aborted: { status: 499, type: INVALID, code: "aborted" }, // nginx's number for a client that went away
  engine: { status: 500, type: SERVER, code: "engine_error", generic: "The model stopped while it was answering." },
  no_space: { status: 503, type: SERVER, code: "out_of_memory", generic: "There is no memory for this model." },
  bad_file: { status: 503, type: SERVER, code: "model_not_loadable", generic: "The model's files are damaged." },
  bad_config: { status: 503, type: SERVER, code: "model_not_loadable", generic: "The model's config.json is wrong." },
  bad_weights: { status: 503, type: SERVER, code: "model_not_loadable", generic: "The model's weights are damaged." },
  verification: { status: 503, type: SERVER, code: "model_not_loadable", generic: "The model failed its own check." },
  network: { status: 503, type: SERVER, code: "network", generic: "A download failed." },
};

/** Any thrown value as status and body. */
export function toHttpError(error: unknown): HttpError {
  if (error instanceof ApiError) {
    const { status, apiCode, message, param, retryAfterSeconds } = error;
    const type = status === 401 ? "authentication_error" : status >= 500 ? SERVER : INVALID;
    return { status, body: body(message, type, param, apiCode), retryAfterSeconds, internal: false };
  }
  if (error instanceof NibbleError) {
    const { status, type, code, generic, retryAfterSeconds } = byCode[error.code];
    const message = generic ?? error.message;
    const internal = generic !== undefined;
    return { status, body: body(message, type, error.param, code), retryAfterSeconds, internal };
  }
  if (isZodError(error)) return toHttpError(fromZod(error));
  return { status: 500, body: body("The server had an error.", SERVER, undefined, null), internal: true };
}

function body(message: string, type: string, param: string | undefined, code: string | null): ErrorBody {
  return { error: { message, type, param: param ?? null, code } };
}

function isZodError(error: unknown): error is ZodError {
  return error instanceof Error && error.name === "ZodError" && "issues" in error;
}

type Issue = core.$ZodIssue;

/** The first issue, worded as OpenAI words it. */
function fromZod(error: ZodError): ApiError {
  const { issue, path } = deepest(named(error.issues[0]), []);
  const param = path.reduce<string>(
    (text, key) => (typeof key === "number" ? `${text}[${key}]` : text ? `${text}.${String(key)}` : String(key)),
    "",
  );
  if (issue.code === "invalid_type" && issue.input === undefined && /received undefined$/.test(issue.message)) {
    return new ApiError(400, "missing_required_parameter", `Missing required parameter: '${param}'.`, { param });
  }
  const code = issue.code === "invalid_type" ? "invalid_type" : "invalid_value";
  const what = issue.code === "invalid_type" ? "Invalid type" : "Invalid value";
  return new ApiError(
    400,
    code,
    `${what} for '${param || "body"}': ${issue.message.replace(/^(Invalid input|Too small|Too big): /, "")}.`,
    {
      param,
    },
  );
}

/** A union of which no branch fits says "Invalid input": its branches say what would. */
function named(issue: Issue): Issue {
  if (issue.code !== "invalid_union" || issue.errors.length === 0) return issue;
  const own = issue.errors.map(([first]) => first).filter((first) => first?.path.length === 0);
  const types = own.filter((first) => first.code === "invalid_type");
  if (own.length < issue.errors.length || types.length === 0) return issue;
  const ofItsType = own.find((first) => first.code !== "invalid_type");
  if (ofItsType) return { ...ofItsType, path: issue.path };
  const received = /received (\w+)$/.exec(types[0].message)?.[1];
  const expected = [...new Set(types.map((first) => (first as { expected: string }).expected))].join(" or ");
  return { ...types[0], path: issue.path, message: `expected ${expected}, received ${received}` };
}

/** Of a union's branches, the one that got furthest. */
function deepest(issue: Issue, above: PropertyKey[]): { issue: Issue; path: PropertyKey[] } {
  const path = [...above, ...issue.path];
  if (issue.code !== "invalid_union" || issue.errors.length === 0) return { issue, path };
  const inner = issue.errors.filter((branch) => branch.length > 0).map((branch) => deepest(named(branch[0]), path));
  const furthest = inner.reduce((best, next) => (next.path.length > best.path.length ? next : best), inner[0]);
  return furthest && furthest.path.length > path.length ? furthest : { issue: named(issue), path };
}
