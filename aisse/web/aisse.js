/** aisse.d.ts describes what is exported. */

const END_OF_LINE = /\r\n|\r|\n/;
const ID = /^[\w-]{22}$/;
const EVENT_ID = /^([\w-]{22})\.(\d{1,16})$/;
const QUEUED = 64; // events for the iteration before reading pauses
const STEADY_MS = 10_000; // a connection that held so long was no failed attempt
const WAITING_MS = 2000; // without an answer: until we say so
const KNOWN_MS = 6000; // a server that has the question answers it sooner: its `first_byte_commit_s` is 5
const now = () => performance.now();

export class ChatError extends Error {
  name = "ChatError";
  constructor(kind, message, { cause, ...fields } = {}) {
    super(message, { cause });
    Object.assign(this, fields, { kind });
  }
}

/** A response is over before `end`. */
class Interrupted {
  constructor(error) {
    this.error = error;
  }
}

export function createParser({ onEvent, onId, onRetry }, maxLength = 1 << 24) {
  let line = "", type = "", id = "", data = [], size = 0, skipLF = false;
  const take = () => {
    if (line === "") {
      const event = { type: type || "message", data: data.join("\n"), id };
      const dispatched = data.length > 0;
      type = "";
      data = [];
      size = 0;
      if (dispatched) onEvent(event);
      return;
    }
    const [, name, value = ""] = /^([^:]*)(?:: ?([^]*))?$/.exec(line);
    if (name === "data") {
      data.push(value);
      size += value.length + 1;
    } else if (name === "event") type = value;
    else if (name === "id" && !value.includes("\0")) onId?.((id = value));
    else if (name === "retry" && /^\d+$/.test(value)) onRetry?.(+value);
  };
  const grow = (text) => {
    line += text;
    if (size + line.length > maxLength) throw new RangeError(`an event is longer than ${maxLength} characters`);
  };
  return (text) => {
    if (text === "") return;
    const lines = (skipLF && text[0] === "\n" ? text.slice(1) : text).split(END_OF_LINE);
    skipLF = text.endsWith("\r"); // it ended its line; an LF that follows is its second half
    const rest = lines.pop();
    for (const end of lines) {
      grow(end);
      take();
      line = "";
    }
    grow(rest);
  };
}

/** In seconds (RFC 9110, section 10.2.3). */
function retryAfter(response) {
  const value = response.headers.get("Retry-After");
  if (!value) return undefined;
  const seconds = /^\d+$/.test(value) ? +value : (Date.parse(value) - Date.now()) / 1000;
  return seconds >= 0 ? seconds : undefined;
}

class Chat {
  id = "";
  cursor = "";
  state = "connecting";
  text = "";
  thinking = "";
  tools = [];
  usage;
  reason;
  error;
  #options;
  #url;
  #headers;
  #saved; // what a reload needs to ask again: key and body
  #body;
  #seq = 0;
  #blocks = new Map(); // tool calls that are being written, by their block's index
  #attempt = 0;
  #retryMs = 2000;
  #heartbeatMs;
  #moveAt = 0; // when the server wants us to come back, elsewhere
  #moving; // the timer for it
  #beyond = false;
  #connection; // an AbortController, aborted with the reason
  #lastByte = 0;
  #queue; // events for the iteration, while there is one
  #stopping = false;
  #asking = false; // a DELETE is under way
  #told = false; // it was answered well
  #again; // the timer for the next one
  #stops = 0; // how many came to nothing
  #stays = false; // the server is about to end: nobody comes back to it
  #asked = now(); // when the request began
  #soon = false; // the next pause is none
  #due; // the pause's end
  #kept; // what is stored
  #over = false;
  #said; // the `error` event's
  #left; // {error}, once the page has left
  #wake = {}; // resolvers: of the pause, of `room` in the queue, of an `event`

  constructor(saved, options = {}) {
    const { id = "", key, body } = saved;
    if (id ? !ID.test(id) : !(key && body)) throw new TypeError("neither an id nor a question");
    this.#options = options;
    this.#url = (options.url ?? "/api/chat").replace(/\/+$/, "");
    new URL(this.#url, globalThis.document?.baseURI ?? globalThis.location?.href); // throws where it is wrong
    this.#headers = new Headers(options.headers);
    this.#heartbeatMs = options.heartbeatMs ?? 15_000;
    this.#saved = { key, body };
    this.#body = JSON.stringify(body);
    this.id = id;
    if (options.after) {
      if (EVENT_ID.exec(options.after)?.[1] !== id) throw new TypeError("`after` is no cursor of this answer");
      this.#moveTo(options.after);
    }
    this.#save();
    // Callbacks may speak of what this is assigned to.
    this.finished = Promise.resolve().then(() => this.#run());
    this.finished.catch(() => {});
  }

  get silenceMs() {
    return this.state === "streaming" ? now() - this.#lastByte : 0;
  }

  async *[Symbol.asyncIterator]() {
    const queue = (this.#queue = []);
    try {
      while (!this.#over || queue.length) {
        if (queue.length) yield queue.shift();
        else await this.#until("event");
        if (queue.length < QUEUED) this.#wake.room?.();
      }
      await this.finished;
    } finally {
      this.#queue = undefined;
      this.detach();
    }
  }

  async stop() {
    if (!this.#stopping && !this.#over && !this.reason) {
      this.#stopping = true;
      this.#wake.room?.(); // who waits for this inside the loop takes no events
      if (this.id) this.#delete();
      else if (this.state === "reconnecting") this.#leave();
      else {
        // A question in a browser's queue may never be sent. One that was is ended by the server's `leave_s`.
        const known = AbortSignal.timeout(Math.max(0, Math.ceil(this.#asked + KNOWN_MS - now())));
        known.addEventListener("abort", () => this.id || this.#leave());
      }
    }
    await this.finished.catch(() => {});
  }

  detach() {
    this.#leave();
  }

  reconnect() {
    this.#drop(new ChatError("moved", "Asked to reconnect."));
  }

  async #run() {
    const { signal } = this.#options;
    const online = () => {
      this.#attempt = 0;
      // An open one may never say that it is dead.
      this.#drop(new ChatError("unreachable", "The network had gone."));
    };
    // Timers are slow where nobody looks.
    const shown = () => document.hidden || now() < this.#due || this.#wake.pause?.();
    const abort = () => this.#leave(signal.reason);
    globalThis.addEventListener?.("online", online);
    globalThis.document?.addEventListener("visibilitychange", shown);
    signal?.addEventListener("abort", abort);
    if (signal?.aborted) abort();
    let error;
    try {
      while (!this.reason && !this.#left) {
        this.#to("connecting");
        if (this.#asking && !this.#left) {
          await this.#answered(this.#until("told"));
          this.#soon = false;
        }
        if (this.#left) break;
        const failure = await this.#connect();
        if (failure && !this.#left && !this.#asking) await this.#pause(failure);
      }
      error = this.reason ? this.#failure() : this.#left.error;
    } catch (thrown) {
      error = thrown;
    }
    this.#over = true;
    clearTimeout(this.#again);
    this.error = error instanceof ChatError ? error : undefined;
    globalThis.removeEventListener?.("online", online);
    globalThis.document?.removeEventListener("visibilitychange", shown);
    signal?.removeEventListener("abort", abort);
    this.#wake.event?.();
    // What can still be read is kept.
    if (this.reason || this.error?.status < 500 || this.#stopping) this.#save(true);
    const kind = this.error?.kind;
    this.#to(this.reason ? "ended" : kind === "refused" || kind === "lost" ? kind : "detached", { error: this.error });
    if (error) throw error;
  }

  /** Reads one response; returns why there must be another, if so. */
  async #connect() {
    const connection = (this.#connection = new AbortController());
    let missed = 0, ticks, opened;
    // Ticks, not time: a suspended tab finds one, and the bytes behind it.
    const watch = (ms) => {
      clearInterval(ticks);
      ticks = setInterval(() => {
        if (this.#wake.room) missed = 0; // we do not read
        else if (++missed > 3) {
          connection.abort(new ChatError("silent", opened ? "The server fell silent." : "There was no answer."));
        }
      }, ms);
    };
    const io = (promise) =>
      promise.catch((cause) => {
        const { aborted, reason } = connection.signal;
        const message = opened ? "The connection was lost." : "The server cannot be reached.";
        throw new Interrupted(aborted ? reason : new ChatError("unreachable", message, { cause }));
      });
    this.#asked = now();
    // Resuming is answered at once, unless over a dead connection that was kept.
    watch(this.id ? Math.min(this.#heartbeatMs, 5000) : this.#heartbeatMs);
    try {
      const response = await this.#answered(io(this.#request(this.id ? "GET" : "POST", connection.signal)));
      if (response.status === 204) {
        // We stand at an end that we never saw. A cursor beyond it is told `end` again.
        this.#soon = !this.#beyond;
        if (this.#soon) this.#seq += 1;
        this.#beyond = true;
        throw new Interrupted(new ChatError("broken", "There is nothing more."));
      }
      if (!response.ok) await this.#refused(response, io);
      if (!response.headers.get("Content-Type")?.startsWith("text/event-stream")) {
        throw new Interrupted(new ChatError("broken", "What came is no event stream."));
      }
      this.#heartbeatMs = 1000 * response.headers.get("Aisse-Heartbeat") || this.#heartbeatMs;
      watch(this.#heartbeatMs);
      opened = this.#lastByte = now();
      this.#learn(/([\w-]{22})$/.exec(response.headers.get("Content-Location"))?.[1]);
      this.error = undefined;
      this.#to("streaming");
      const reader = response.body.getReader(), decoder = new TextDecoder();
      const feed = createParser({
        onEvent: (event) => this.#take(event),
        onId: (id) => this.id || this.#learn(EVENT_ID.exec(id)?.[1]),
        onRetry: (ms) => (this.#retryMs = Math.min(Math.max(ms, 100), 1e9)), // a timer has 31 bits
      });
      while (!this.reason) {
        // In Node such a read may never settle.
        if (connection.signal.aborted) throw new Interrupted(connection.signal.reason);
        const { done, value } = await io(reader.read());
        if (done) throw new Interrupted(new ChatError("broken", "The answer broke off."));
        missed = 0;
        this.#lastByte = now();
        feed(decoder.decode(value, { stream: true }));
        while (this.#queue?.length >= QUEUED && !this.reason && !this.#stopping && !connection.signal.aborted) {
          await this.#until("room");
        }
      }
      reader.read().catch(() => {}); // frees the connection
      this.#connection = undefined;
    } catch (error) {
      if (!(error instanceof Interrupted)) throw error;
      if (this.#left) return undefined;
      if (this.#lastByte - opened > STEADY_MS) this.#attempt = 0;
      return error.error;
    } finally {
      clearInterval(ticks);
      clearTimeout(this.#moving);
      this.#connection?.abort();
      this.#connection = undefined;
    }
  }

  async #request(method, signal) {
    const { credentials, fetch: request = (...all) => fetch(...all) } = this.#options;
    const headers = new Headers(this.#headers);
    headers.set("Accept", "text/event-stream");
    // A stop is not to stand behind questions in a browser's queue.
    const priority = this.#stopping ? "high" : "low";
    if (method === "POST") {
      headers.set("Content-Type", "application/json");
      headers.set("Idempotency-Key", this.#saved.key);
      return request(this.#url, { method, headers, credentials, signal, priority, body: this.#body });
    }
    const reading = method === "GET";
    if (reading && this.#seq) headers.set("Last-Event-ID", `${this.id}.${this.#seq}`);
    const url = `${this.#url}/${this.id}${reading ? "?compact=1" : ""}`;
    return request(url, { method, headers, credentials, signal, priority, cache: "no-store" });
  }

  async #refused(response, io) {
    const { status } = response;
    const text = await io(response.text());
    let said;
    try { said = JSON.parse(text).error; } catch { /* a proxy's page */ }
    const message = said?.message ?? `The server answered ${status}.`;
    const fields = { status, type: said?.type, retryAfter: retryAfter(response) };
    if (status >= 500) throw new Interrupted(new ChatError("unavailable", message, fields));
    if (!this.id || (status !== 404 && status !== 410)) throw new ChatError("refused", message, fields);
    if (!this.#stopping) throw new ChatError("lost", "The server no longer has this answer.", fields);
    this.#leave();
    throw new Interrupted();
  }

  async #pause(failure) {
    if (this.#stopping && !this.id) return this.#leave();
    const moving = this.#moveAt > 0;
    if (moving) failure = new ChatError("moved", "The server shuts down.", { cause: failure });
    let delayMs = Math.max(0, this.#moveAt - now());
    this.#moveAt = 0;
    this.error = failure;
    if (this.#soon) delayMs = 0;
    else {
      this.#attempt += 1;
      // Offline says nothing about the server.
      if (this.#attempt > (this.#options.retries ?? 10) && globalThis.navigator?.onLine !== false) {
        throw new ChatError("lost", `Gave up after ${this.#attempt - 1} attempts. ${failure.message}`, { cause: failure });
      }
      if (!moving) {
        // Full jitter: not all come back together.
        const most = Math.min(this.#options.maxDelayMs ?? 30_000, this.#retryMs * 2 ** Math.min(this.#attempt - 1, 20));
        delayMs = Math.min(1000 * (failure.retryAfter ?? 0) + Math.random() * most, 2 ** 31 - 1);
      }
    }
    this.#soon = false;
    this.#to("reconnecting", { delayMs, attempt: this.#attempt, error: failure });
    if (!this.#left && !this.#soon) {
      this.#due = now() + delayMs;
      const timer = setTimeout(() => this.#wake.pause?.(), delayMs);
      await this.#until("pause");
      clearTimeout(timer);
    }
    this.#soon = false;
  }

  /**
   * What `answer` comes to. That it takes its time is told: a browser does not say that it queues a request. Once the
   * server has stopped, what is left is not worth a long wait.
   */
  async #answered(answer) {
    let timer;
    const late = new Promise((resolve) => (timer = setInterval(resolve, WAITING_MS, this)));
    try {
      if ((await Promise.race([answer, late])) === this) {
        if (this.#told) this.#leave();
        else this.#to("waiting");
      }
      return await answer;
    } finally {
      clearInterval(timer);
    }
  }

  /** Ends the connection or the pause; the next attempt follows at once. */
  #drop(error) {
    this.#soon = !this.#over;
    this.#connection?.abort(error);
    this.#wake.pause?.();
    this.#wake.room?.();
  }

  #leave(error) {
    if (this.#over || this.#left) return;
    this.#left = { error };
    this.#drop(error);
    this.#wake.told?.();
  }

  /** Ends the generation. Ours may be the only connection to be had for that; reading goes on once it is answered. */
  async #delete() {
    this.#asking = true;
    this.#drop(new ChatError("moved", "It made room to stop."));
    this.#moveAt = 0;
    const soon = AbortSignal.timeout(Math.ceil(this.#heartbeatMs));
    const { status } = await this.#request("DELETE", soon).catch(() => ({ status: 503 }));
    this.#asking = false;
    if (this.#over) return;
    if (status >= 500 && !this.#stays) {
      const delayMs = Math.min(this.#options.maxDelayMs ?? 30_000, this.#retryMs * 2 ** this.#stops++);
      this.#again = setTimeout(() => this.#delete(), delayMs);
    } else if (status >= 500 || status === 404) this.#leave(); // it is over, and forgotten
    else if (status >= 400) this.#leave(new ChatError("refused", `Stopping was answered ${status}.`, { status }));
    else this.#told = true;
    this.#wake.told?.();
  }

  async #until(what) {
    await new Promise((resolve) => (this.#wake[what] = resolve));
    this.#wake[what] = undefined;
  }

  #to(state, detail = {}) {
    this.state = state;
    this.#options.onState?.(state, detail);
  }

  #learn(id) {
    if (this.id || !id) return;
    this.id = id;
    this.#save();
    if (this.#stopping) this.#delete();
  }

  #moveTo(cursor) {
    this.cursor = cursor;
    this.#seq = +cursor.split(".")[1];
  }

  #take({ type, data: text, id }) {
    if (this.#left) return;
    let data = text;
    try { data = JSON.parse(text); } catch { /* it stays text */ }
    const kind = type === "message" ? data?.type : type; // some servers leave `event:` out
    const event = { id, event: type, data, type: "other" };
    if (kind === "reconnect") {
      Object.assign(event, { type: kind, resume: data.resume });
      if (data.resume && !this.#moveAt) {
        this.#moveAt = now() + this.#retryMs;
        this.#moving = setTimeout(() => this.#connection?.abort(), this.#retryMs);
      }
      this.#stays = !data.resume;
    } else {
      const seq = +EVENT_ID.exec(id)?.[2];
      if (seq <= this.#seq && kind !== "end") return;
      this.#attempt = 0;
      if (seq) this.#moveTo(id);
      this.#read(kind, data, event);
    }
    if (event.type === "text") this.#options.onText?.(event.text);
    if (event.type === "thinking") this.#options.onThinking?.(event.text);
    this.#options.onEvent?.(event);
    if (kind !== "reconnect") this.#save();
    this.#queue?.push(event);
    this.#wake.event?.();
  }

  #read(kind, data, event) {
    const { index, delta, content_block: block } = data ?? {};
    // Who makes room for a stop may be missed before it is asked for.
    const missed = this.#stopping && /^abandoned/.test(data?.reason ?? data?.error?.type);
    if (kind === "end") {
      this.reason = missed ? "stopped" : data.reason;
      this.usage = data.usage;
      Object.assign(event, { type: kind, reason: this.reason, usage: data.usage });
    } else if (kind === "error" && !missed) {
      Object.assign(event, { type: kind, error: data.error });
      this.#said = data.error;
    } else if (delta?.partial_json !== undefined) {
      const [tool] = this.#blocks.get(index) ?? [];
      if (tool) tool.json += delta.partial_json;
    } else if (kind === "content_block_stop" && this.#blocks.has(index)) {
      const [tool, whole] = this.#blocks.get(index);
      this.#blocks.delete(index);
      try { tool.input = JSON.parse(tool.json || whole); } catch { /* stays undefined */ }
      Object.assign(event, { type: "tool", tool });
    } else if (`${block?.type}`.endsWith("tool_use")) {
      const tool = { id: block.id, name: block.name, json: "" };
      this.#blocks.set(index, [tool, JSON.stringify(block.input ?? {})]);
      this.tools.push(tool);
    } else {
      const { text, thinking } = delta ?? block ?? {};
      if (text) Object.assign(event, { type: "text", text });
      else if (thinking) Object.assign(event, { type: "thinking", text: thinking });
      this.text += text ?? "";
      this.thinking += thinking ?? "";
    }
  }
  #failure() {
    if (this.reason === "complete" || this.reason === "stopped") return undefined;
    const message = this.#said?.message ?? `The answer ended early: ${this.reason}.`;
    return new ChatError("failed", message, { type: this.#said?.type });
  }

  #save(over) {
    const { keep } = this.#options;
    if (!keep) return;
    try {
      // What another chat keeps under this name by now is not ours.
      if (this.#kept && sessionStorage.getItem(keep) !== this.#kept) return;
      const saved = JSON.stringify(this.id ? { id: this.id, cursor: this.cursor } : this.#saved);
      if (over) return sessionStorage.removeItem(keep);
      sessionStorage.setItem(keep, saved);
      this.#kept = saved;
    } catch { /* full, or not allowed */ }
  }
}

export function streamChat(body, options) {
  // Not randomUUID(), which pages without TLS lack.
  const random = crypto.getRandomValues(new Uint8Array(16));
  return new Chat({ key: Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join(""), body }, options);
}

export function resumeChat(saved, options) {
  return new Chat(typeof saved === "string" ? { id: saved } : saved, options);
}

export function savedChat(name) {
  try {
    const saved = JSON.parse(sessionStorage.getItem(name));
    return ID.test(saved.id) || (saved.key && saved.body) ? saved : undefined;
  } catch {
    return undefined; // none, or not allowed
  }
}
