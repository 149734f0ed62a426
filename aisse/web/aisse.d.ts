/** The body of `POST /api/chat`: a Messages API request, as far as the server lets a client set it. */
export interface ChatRequest {
  messages: { role: "user" | "assistant"; content: string | Record<string, unknown>[] }[];
  model?: string;
  max_tokens?: number;
  system?: string | Record<string, unknown>[];
  [parameter: string]: unknown;
}

/**
 * `connecting`: a request is under way, after `stop()` the one that stops. `waiting`: it has had no answer for two
 * seconds; the server takes its time, or the browser has not sent it yet, since over HTTP/1.1 it has six connections for
 * a site: nothing tells a page which. `streaming`: connected; heartbeats or events arrive. `reconnecting`: the connection
 * was lost, refused with a 5xx, or given up by the server; the next attempt comes after `delayMs`.
 * Final: `ended` (the `end` event came), `refused` (a 4xx), `lost` (no attempt left, or the answer is gone from the
 * server), `detached` (the page left; the answer can be resumed).
 */
export type ChatState =
  | "connecting" | "waiting" | "streaming" | "reconnecting" | "ended" | "refused" | "lost" | "detached";

export interface StateDetail {
  /** `reconnecting`: milliseconds until the next attempt. */
  delayMs?: number;
  /** Attempts in a row that brought nothing new, this one included; it counts against `retries`. */
  attempt?: number;
  /** Why: what failed. In the states `refused` and `lost`, and in `ended` unless it went well, what is thrown. */
  error?: ChatError;
}

/**
 * How an answer ended, as the server says it. All but the first two come with an error. An `abandoned` after `stop()` is
 * told as `stopped`: the connection that it gave up may have been the only reader's.
 */
export type EndReason =
  | "complete" | "stopped" | "abandoned" | "error" | "truncated" | "timeout" | "limit" | "shutdown" | "producer_lost";

export interface Usage { input_tokens: number; output_tokens: number }

/** A tool call. `json` grows; `input` is there once it is complete, and stays undefined where it was no JSON. */
export interface Tool { id: string; name: string; json: string; input?: unknown }

interface Sent {
  /** `<stream>.<number>`; of `reconnect`, which is no part of the answer, the one before. */
  id: string;
  /** The name on the wire: `content_block_delta`, `end`, ... */
  event: string;
  /** The upstream's JSON, parsed; its text where it is none. */
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
  /** Of the chat endpoint: "/api/chat", wherever this module lies. Outside of pages it has to be absolute. */
  url?: string;
  /** Sent with every request, `Authorization` above all. */
  headers?: Record<string, string>;
  /** Of `fetch`, with every request: "same-origin". */
  credentials?: "omit" | "same-origin" | "include";
  /** Aborting detaches: the iteration throws the signal's reason; the generation has the server's `leave_s` left. */
  signal?: AbortSignal | undefined;
  onText?(text: string): void;
  onThinking?(text: string): void;
  onEvent?(event: ChatEvent): void;
  onState?(state: ChatState, detail: StateDetail): void;
  /** Attempts in a row without anything new before the answer counts as lost: 10. `Infinity` never gives up. */
  retries?: number;
  /** Longest pause between two attempts: 30,000 milliseconds. */
  maxDelayMs?: number;
  /** What the server's `heartbeat_s` is where it does not tell: 15,000. After three without a byte we come back. */
  heartbeatMs?: number;
  /** A name in `sessionStorage` under which id and cursor are kept while the answer is unfinished: see `savedChat`. */
  keep?: string;
  /** In place of the global one. */
  fetch?: typeof fetch;
}

/** What `keep` kept: an answer by its id, or a question that the server had not answered yet, to be asked again. */
export interface SavedChat {
  id?: string;
  /** The last event of which callbacks were told; a loop may be behind it. */
  cursor?: string;
  key?: string;
  body?: ChatRequest;
}

/**
 * One answer. It is read from the moment of its creation, whether or not anybody iterates. The iteration begins with
 * the next event, so begin it at once; there is one. While it runs, the answer is read no faster than it is taken.
 * It ends after `end` where that says `complete` or `stopped`, and after `detach()`; leaving the loop early detaches.
 * Else it throws: a ChatError, the signal's reason, what a callback threw, or a RangeError for an event beyond 16 Mi
 * characters.
 */
export interface Chat extends AsyncIterable<ChatEvent> {
  /** The stream's, as soon as it is known; "" before. Whoever has it can read and stop the answer. */
  readonly id: string;
  /** Of the last event that callbacks were told, `<stream>.<number>`; "" before the first. A loop may be behind it. */
  readonly cursor: string;
  readonly state: ChatState;
  /** All text so far. After `resumeChat` with a cursor, of what came since. */
  readonly text: string;
  readonly thinking: string;
  readonly tools: readonly Tool[];
  /** As `end` reports it. */
  readonly usage: Usage | undefined;
  /** `end`'s; undefined before it. */
  readonly reason: EndReason | undefined;
  /** The latest failure: what made it reconnect, what is thrown; undefined while all is well. */
  readonly error: ChatError | undefined;
  /** Milliseconds since the last byte of this connection; 0 while there is none. */
  readonly silenceMs: number;
  /** Settles as the iteration does; for those who do not iterate. Nobody has to handle its rejection. */
  readonly finished: Promise<void>;
  /**
   * Ends the generation at the server. Resolves once the answer is over: `ended` with `stopped` after what was still on
   * its way, or `detached` where that cannot be heard within two seconds. The connection is given up for it, since a
   * browser may have no other. A question that has no answer after six seconds is left: it may never have been sent,
   * and what was begun nevertheless has the server's `leave_s` left.
   */
  stop(): Promise<void>;
  /** Leaves. The generation has the server's `leave_s` left; `resumeChat` comes back to it. */
  detach(): void;
  /** Drops the connection, if there is one, and comes back at once. */
  reconnect(): void;
}

export class ChatError extends Error {
  private constructor();
  /**
   * `refused`: a 4xx. `lost`: the attempts are used up, or the server does not know the answer any more. `failed`: the
   * `end` event says that the answer is not whole. `unreachable`, `unavailable` (a 5xx), `silent`, `broken` (what came
   * is no event stream, or it stopped without `end`), `moved`: why it reconnects.
   */
  readonly kind: "refused" | "lost" | "failed" | "unreachable" | "unavailable" | "silent" | "broken" | "moved";
  /** The HTTP status, where there was one. */
  readonly status?: number;
  /** The type in the server's error, `overloaded_error` for one. */
  readonly type?: string;
  /** Seconds that the server asked to wait. */
  readonly retryAfter?: number;
}

/** Asks. A repeated request is recognised by its Idempotency-Key: nothing is generated twice. */
export function streamChat(body: ChatRequest, options?: ChatOptions): Chat;

/**
 * Reads an answer from its beginning, or from what follows `after`, a cursor. `saved`, an id or what `savedChat`
 * found, without an id asks its question again, with its key.
 */
export function resumeChat(saved: string | SavedChat, options?: ChatOptions & { after?: string | undefined }): Chat;

/** What an earlier load of this page kept under `name` and did not finish. */
export function savedChat(name: string): SavedChat | undefined;

export interface ServerEvent { type: string; data: string; id: string }

/**
 * An incremental parser for an event stream (WHATWG HTML, section 9.2.6): call what it returns with each piece of text,
 * as one TextDecoder gives it, which drops a byte order mark. Throws a RangeError for an event beyond `maxLength`
 * characters, 16 Mi.
 */
export function createParser(handlers: {
  onEvent(event: ServerEvent): void;
  onId?(id: string): void;
  onRetry?(ms: number): void;
}, maxLength?: number): (text: string) => void;
