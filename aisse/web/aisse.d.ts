/** The body of `POST /api/chat`: a Messages API request, as far as the server lets a client set it. */
export interface ChatRequest {
  messages: { role: "user" | "assistant"; content: string | Record<string, unknown>[] }[];
  model?: string;
  max_tokens?: number;
  system?: string | Record<string, unknown>[];
  [parameter: string]: unknown;
}

/**
 * - `connecting`: a request is under way. After `stop()` it is the request that stops.
 * - `waiting`: the request has had no answer for two seconds. Either the server takes its time, or the browser has not
 *   sent the request yet: over HTTP/1.1 it has six connections for a site. Nothing tells a page which of the two it is.
 * - `streaming`: connected. Heartbeats or events arrive.
 * - `reconnecting`: the connection was lost, refused with a 5xx, or given up by the server. The next attempt comes
 *   after `delayMs`.
 *
 * Four states are final: `ended` (the `end` event came), `refused` (a 4xx), `lost` (no attempt is left, or the server
 * does not have the answer any more) and `detached` (the page left; the answer can be resumed).
 */
export type ChatState =
  | "connecting" | "waiting" | "streaming" | "reconnecting" | "ended" | "refused" | "lost" | "detached";

export interface StateDetail {
  /** `reconnecting`: milliseconds until the next attempt. */
  delayMs?: number;
  /** Attempts in a row that brought nothing new, this one included. `retries` is the limit for it. */
  attempt?: number;
  /** What failed. In the states `refused` and `lost`, and in `ended` unless it went well, it is what is thrown. */
  error?: ChatError;
}

/**
 * How an answer ended, as the server says it. All but the first two come with an error. After `stop()` an `abandoned`
 * is told as `stopped`: `stop()` gives up its connection, and it may have been the only one that read the answer.
 */
export type EndReason =
  | "complete" | "stopped" | "abandoned" | "error" | "truncated" | "timeout" | "limit" | "shutdown" | "producer_lost";

export interface Usage { input_tokens: number; output_tokens: number }

/** A tool call. `json` grows. `input` is there once it is complete, unless it was no JSON. */
export interface Tool { id: string; name: string; json: string; input?: unknown }

interface Sent {
  /** `<stream>.<number>`. `reconnect` is no part of the answer and has the id of the event before it. */
  id: string;
  /** The name on the wire: `content_block_delta`, `end`, ... */
  event: string;
  /** The upstream's JSON, parsed; its text where it is not JSON. */
  data: any;
}

export type ChatEvent = Sent & (
  | { type: "text"; text: string }
  | { type: "thinking"; text: string }
  /** A tool call is complete. */
  | { type: "tool"; tool: Tool }
  | { type: "error"; error: { type: string; message: string } }
  | { type: "end"; reason: EndReason; usage: Usage }
  /** The server shuts down. With `resume` it closes this connection soon, and the client comes back by itself. */
  | { type: "reconnect"; resume: boolean }
  /** Everything else that the upstream said. */
  | { type: "other" });

export interface ChatOptions {
  /** The chat endpoint: "/api/chat", wherever this module lies. Outside of pages it has to be absolute. */
  url?: string;
  /** Sent with every request; `Authorization`, for example. */
  headers?: Record<string, string>;
  /** As for `fetch`, with every request: "same-origin" by default. */
  credentials?: "omit" | "same-origin" | "include";
  /** Aborting detaches: the iteration throws the signal's reason. The generation has the server's `leave_s` left. */
  signal?: AbortSignal | undefined;
  onText?(text: string): void;
  onThinking?(text: string): void;
  onEvent?(event: ChatEvent): void;
  onState?(state: ChatState, detail: StateDetail): void;
  /** After so many attempts in a row without anything new the answer counts as lost: 10. `Infinity` never gives up. */
  retries?: number;
  /** Longest pause between two attempts: 30,000 milliseconds. */
  maxDelayMs?: number;
  /** The server's `heartbeat_s` in case it does not tell: 15,000. After three of them without a byte we come back. */
  heartbeatMs?: number;
  /** The name in `sessionStorage` that keeps id and cursor while the answer is unfinished: see `savedChat`. */
  keep?: string;
  /** In place of the global one. */
  fetch?: typeof fetch;
}

/** What `keep` kept: an answer by its id, or a question to be asked again, since the server had not answered it yet. */
export interface SavedChat {
  id?: string;
  /** The last event that callbacks were told of. A loop may be behind it. */
  cursor?: string;
  key?: string;
  body?: ChatRequest;
}

/**
 * One answer. It is read from the moment of its creation, whether or not anybody iterates. There is one iteration. It
 * begins with the next event, so begin it at once. While it runs, the answer is read no faster than it is taken.
 * It ends after an `end` that says `complete` or `stopped`, and after `detach()`. To leave the loop early detaches.
 * Otherwise it throws: a ChatError, the signal's reason, what a callback threw, or a RangeError for an event beyond
 * 16 Mi characters.
 */
export interface Chat extends AsyncIterable<ChatEvent> {
  /** The stream's id, as soon as it is known; "" before. Whoever has it can read the answer and stop it. */
  readonly id: string;
  /** `<stream>.<number>` of the last event that callbacks got; "" before the first. A loop may be behind it. */
  readonly cursor: string;
  readonly state: ChatState;
  /** All text so far. After `resumeChat` with a cursor it is the text that came since. */
  readonly text: string;
  readonly thinking: string;
  readonly tools: readonly Tool[];
  /** As `end` reports it. */
  readonly usage: Usage | undefined;
  /** What `end` says; undefined before it. */
  readonly reason: EndReason | undefined;
  /** The latest failure, which made it reconnect or is thrown; undefined while all is well. */
  readonly error: ChatError | undefined;
  /** Milliseconds since the last byte of this connection; 0 while there is none. */
  readonly silenceMs: number;
  /** Settles as the iteration does, for those who do not iterate. Nobody has to handle its rejection. */
  readonly finished: Promise<void>;
  /**
   * Ends the generation at the server. Resolves once the answer is over: `ended` with `stopped` after what was still on
   * its way, or `detached` if that cannot be heard within two seconds. It gives up its connection to ask for it, as a
   * browser may have no other. A question that has no answer after six seconds is left, since it may never have been
   * sent. If it was sent, the generation has the server's `leave_s` left.
   */
  stop(): Promise<void>;
  /** Leaves. The generation has the server's `leave_s` left, and `resumeChat` comes back to it. */
  detach(): void;
  /** Drops the connection, if there is one, and comes back at once. */
  reconnect(): void;
}

export class ChatError extends Error {
  private constructor();
  /**
   * `refused`: a 4xx. `lost`: the attempts are used up, or the server does not know the answer any more. `failed`: the
   * `end` event says that the answer is not whole. The others say why it reconnects: `unreachable`, `unavailable` (a
   * 5xx), `silent`, `broken` (what came is no event stream, or it stopped without `end`), `moved`.
   */
  readonly kind: "refused" | "lost" | "failed" | "unreachable" | "unavailable" | "silent" | "broken" | "moved";
  /** The HTTP status, where there was one. */
  readonly status?: number;
  /** The type in the server's error; `overloaded_error`, for example. */
  readonly type?: string;
  /** Seconds that the server asked to wait. */
  readonly retryAfter?: number;
}

/** Asks. The server recognises a repeated request by its Idempotency-Key, so nothing is generated twice. */
export function streamChat(body: ChatRequest, options?: ChatOptions): Chat;

/**
 * Reads an answer from its beginning, or what follows the cursor `after`. `saved` is an id, or what `savedChat` found.
 * If that has no id, its question is asked again, with its key.
 */
export function resumeChat(saved: string | SavedChat, options?: ChatOptions & { after?: string | undefined }): Chat;

/** What an earlier load of this page kept under `name` and did not finish. */
export function savedChat(name: string): SavedChat | undefined;

export interface ServerEvent { type: string; data: string; id: string }

/**
 * An incremental parser for an event stream (WHATWG HTML, section 9.2.6). Call what it returns with each piece of text.
 * The pieces have to come from one TextDecoder, which drops a byte order mark. It throws a RangeError for an event of
 * more than `maxLength` characters (16 Mi).
 */
export function createParser(handlers: {
  onEvent(event: ServerEvent): void;
  onId?(id: string): void;
  onRetry?(ms: number): void;
}, maxLength?: number): (text: string) => void;
