/**
 * Every request field of the OpenAI-shaped endpoints: done, accepted without effect, or refused. The documentation's
 * table is printed from this one. A field that is not here is refused by name, so that a misspelt one is noticed; what
 * popular local clients send is listed under `local`.
 */
import { refuse } from "./errors.ts";

export type FieldStatus = "done" | "ignored" | "refused";

export interface Field {
  readonly name: string;
  readonly status: FieldStatus;
  /** What it does, why it has no effect, or what to do instead. */
  readonly note: string;
  /** Values of a refused field that mean "off", which are accepted. */
  readonly neutral?: readonly unknown[];
}

export type Endpoint = "/v1/chat/completions" | "/v1/completions" | "/v1/embeddings" | "/v1/responses" | "/v1/messages";

const done = (name: string, note: string): Field => ({ name, status: "done", note });
const ignored = (name: string, note: string): Field => ({ name, status: "ignored", note });
const refused = (name: string, note: string, ...neutral: unknown[]): Field => ({
  name,
  status: "refused",
  note,
  neutral,
});

/** Fields that name a caller, a tariff or a cache: they cannot change the answer. */
const bookkeeping = [
  ignored("user", "names the caller"),
  ignored("metadata", "kept for the caller's own records"),
  ignored("service_tier", "there is one tier"),
  ignored("safety_identifier", "names the caller"),
  ignored("prompt_cache_key", "prefixes are found by their tokens"),
  ignored("prompt_cache_retention", "prefixes are kept while there is room"),
  ignored("prompt_cache_options", "prefixes are kept while there is room"),
];

const sampling = [
  done("temperature", "0 to 2; 0 is greedy"),
  done("top_p", "0 to 1"),
  done("top_k", "keep the k likeliest tokens; 0 keeps all"),
  done("min_p", "keep tokens at least this times as likely as the likeliest"),
  done("repetition_penalty", "divides the logits of tokens seen before"),
  done("presence_penalty", "-2 to 2"),
  done("frequency_penalty", "-2 to 2"),
  done("logit_bias", "token id to -100 .. 100"),
  done("seed", "same seed, same request, same answer"),
  done("stop", "up to 32 strings"),
  done("ignore_eos", "do not stop at end-of-sequence tokens"),
  done("grammar", "an EBNF grammar that the answer obeys"),
];

/** Sent by clients of llama.cpp, vLLM and Ollama. */
const local = [
  done("repeat_penalty", "llama.cpp's name of repetition_penalty"),
  ignored("cache_prompt", "prefixes are always reused"),
  ignored("id_slot", "requests take any place"),
  ignored("n_keep", "nothing is dropped from a prompt"),
  ignored("timings_per_token", "log probabilities and usage are complete without it"),
  ignored("return_progress", "progress is not part of the answer"),
  ignored("return_tokens", "log probabilities name the tokens"),
  ignored("keep_alive", "the server's --idle-unload decides"),
  ignored("request_id", "the header x-request-id names the request"),
  ignored("priority", "requests are answered in turn"),
  ignored("add_generation_prompt", "always true"),
  refused("typical_p", "typical sampling is not done", 1),
  refused("tfs_z", "tail-free sampling is not done", 1),
  refused("mirostat", "mirostat is not done", 0, false),
  refused("xtc_probability", "XTC is not done", 0),
  refused("dynatemp_range", "dynamic temperature is not done", 0),
  refused("dry_multiplier", "DRY is not done", 0),
  refused("best_of", "one sample per choice", 1),
  refused("use_beam_search", "beam search is not done", false),
];

const chat = [
  done("model", "a name from /v1/models; without it the first one"),
  done("messages", "roles developer, system, user, assistant, tool; text parts"),
  done("stream", "server-sent events"),
  done("stream_options", "include_usage; include_obfuscation has no effect"),
  done("max_completion_tokens", "tokens of the answer, thoughts included"),
  done("max_tokens", "the older name of max_completion_tokens"),
  done("n", "1 to 16 answers"),
  done("logprobs", "log probability of each token"),
  done("top_logprobs", "0 to 20 alternatives"),
  done("response_format", "text, json_object, json_schema"),
  done("tools", "functions"),
  done("tool_choice", "none, auto, required, a named function"),
  done("parallel_tool_calls", "false: at most one call"),
  done("reasoning_effort", "none turns thinking off where the template can; other values turn it on"),
  done("reasoning_format", "none leaves thoughts in the content; auto and deepseek split them off"),
  done("chat_template_kwargs", "variables of the chat template"),
  ...sampling,
  ...local.filter(({ name }) => name !== "best_of"),
  ...bookkeeping,
  ignored("prediction", "a hint for speed"),
  refused("store", "answers are not stored", false),
  refused("modalities", "answers are text", ["text"]),
  refused("verbosity", "ask for it in the prompt", "medium"),
  refused("audio", "answers are text"),
  refused("web_search_options", "the server does not search"),
  refused("functions", "use tools"),
  refused("function_call", "use tool_choice"),
  refused("moderation", "nothing is moderated"),
];

const completions = [
  done("model", "a name from /v1/models; without it the first one"),
  done("prompt", "a string, strings, token ids or lists of them"),
  done("echo", "the prompt before the answer, with its log probabilities where asked for"),
  done("suffix", "text after the gap, for models with fill-in-the-middle tokens; the answer ends where it begins"),
  done("logprobs", "0 to 20 alternatives"),
  done("max_tokens", "default 16"),
  done("n", "1 to 16 answers"),
  done("stream", "server-sent events"),
  done("stream_options", "include_usage"),
  done("response_format", "text, json_object, json_schema"),
  ...sampling,
  ...local,
  ...bookkeeping,
];

const embeddings = [
  done("model", "a name from /v1/models; without it the first one"),
  done("input", "a string, strings, token ids or lists of them"),
  done("encoding_format", "float or base64"),
  done("dimensions", "the first n, normalised again"),
  ignored("user", "names the caller"),
  ignored("truncate_prompt_tokens", "too long an input is refused"),
];

const responses = [
  done("model", "a name from /v1/models; without it the first one"),
  done("input", "a string, or messages, function calls and their outputs, references to items of earlier answers"),
  done("instructions", "the system message"),
  done("max_output_tokens", "tokens of the answer, thoughts included"),
  done("stream", "typed events"),
  done("temperature", "0 to 2; 0 is greedy"),
  done("top_p", "0 to 1"),
  done("top_logprobs", "0 to 20; with include message.output_text.logprobs"),
  done("text", "format text, json_object, json_schema; verbosity medium"),
  done("tools", "functions"),
  done("tool_choice", "none, auto, required, a named function"),
  done("parallel_tool_calls", "false: at most one call"),
  done("reasoning", "effort none turns thinking off where the template can; summary has no effect"),
  done("include", "message.output_text.logprobs; reasoning.encrypted_content has no effect"),
  done("metadata", "comes back with the answer"),
  done("store", "false forgets the answer; else input may name its items by item_reference while there is room"),
  ...bookkeeping.filter(({ name }) => name !== "metadata"),
  ignored("stream_options", "include_obfuscation pads nothing here"),
  ignored("max_tool_calls", "limits built-in tools, of which there are none"),
  refused("previous_response_id", "answers are not stored: send the conversation as input"),
  refused("conversation", "answers are not stored: send the conversation as input"),
  refused("background", "answers are not stored", false),
  refused("truncation", "too long an input is refused", "disabled"),
  refused("prompt", "there are no stored prompts"),
  refused("context_management", "too long an input is refused"),
  refused("access_programs", "there are none"),
  refused("image", "answers are text"),
  refused("moderation", "nothing is moderated"),
];

const messages = [
  done("model", "a name from /v1/models"),
  done("messages", "text, tool_use, tool_result and thinking blocks"),
  done("system", "a string or text blocks"),
  done("max_tokens", "tokens of the answer"),
  done("stop_sequences", "up to 32 strings"),
  done("stream", "typed events"),
  done("temperature", "0 to 1"),
  done("top_p", "0 to 1"),
  done("top_k", "keep the k likeliest tokens"),
  done("tools", "custom tools"),
  done("tool_choice", "auto, any, tool, none"),
  done("thinking", "disabled turns thinking off where the template can; enabled turns it on"),
  done("output_config", "format json_schema; effort has no effect"),
  ignored("metadata", "kept for the caller's own records"),
  ignored("service_tier", "there is one tier"),
  ignored("cache_control", "prefixes are always reused"),
  ignored("inference_geo", "the answer is computed here"),
  ignored("speed", "there is one speed"),
  ignored("diagnostics", "not part of the answer"),
  ignored("user_profile_id", "names the caller"),
  ignored("workspace_id", "names the caller"),
  ignored("betas", "names features by their header"),
  refused("thread", "answers are not stored: send the whole conversation"),
  refused("container", "the server runs no code"),
  refused("mcp_servers", "the server calls no tools itself", []),
  refused("context_management", "too long an input is refused"),
];

export const fields: Readonly<Record<Endpoint, readonly Field[]>> = {
  "/v1/chat/completions": chat,
  "/v1/completions": completions,
  "/v1/embeddings": embeddings,
  "/v1/responses": responses,
  "/v1/messages": messages,
};

/** The body's fields that are done, without nulls; throws on those refused or unknown. */
export function acceptFields(endpoint: Endpoint, body: Readonly<Record<string, unknown>>): Record<string, unknown> {
  const known = new Map(fields[endpoint].map((field) => [field.name, field]));
  const accepted: Record<string, unknown> = {};
  for (const [name, value] of Object.entries(body)) {
    if (value === null || value === undefined) continue;
    const field = known.get(name);
    if (!field) throw unknownField(name);
    if (field.status === "refused" && !isNeutral(field, value)) {
      throw refuse(name, `Unsupported parameter: '${name}' is not supported by this server: ${field.note}.`);
    }
    if (field.status === "done") accepted[name] = value;
  }
  return accepted;
}

function unknownField(name: string): Error {
  const shown = name.length > 64 ? `${name.slice(0, 64)}...` : name;
  return refuse(shown, `Unknown parameter: '${shown}'.`, "unknown_parameter");
}

function isNeutral(field: Field, value: unknown): boolean {
  return (field.neutral ?? []).some((neutral) => JSON.stringify(neutral) === JSON.stringify(value));
}

/** The table as Markdown, for the documentation. */
export function fieldsMarkdown(): string {
  const lines: string[] = [];
  for (const [endpoint, list] of Object.entries(fields)) {
    lines.push(`### ${endpoint}`, "", "| field | | |", "| --- | --- | --- |");
    for (const { name, status, note, neutral = [] } of list) {
      const off = neutral.length > 0 ? ` (accepted: ${neutral.map((value) => JSON.stringify(value)).join(", ")})` : "";
      lines.push(`| \`${name}\` | ${status} | ${note}${off} |`);
    }
    lines.push("");
  }
  return lines.join("\n");
}
