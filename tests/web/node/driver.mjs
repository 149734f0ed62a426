// Runs what lines of JSON on standard input ask for, and tells each run's outcome as a line on standard output.
//
// {patch: {...}} changes this process's globals until the next patch, {run, ...} begins a run, {run, do: "stop"} acts
// on one that is under way, {run, do: "tell"} asks for what there is of it.
import { createInterface } from "node:readline";
import { parse } from "./parse.mjs";

const [, , path] = process.argv;
const native = { setTimeout, random: Math.random, randomUUID: crypto.randomUUID };

/** An EventTarget that counts its listeners. */
class Target extends EventTarget {
  listeners = 0;
  hidden = false;
  addEventListener(...all) {
    this.listeners += 1;
    super.addEventListener(...all);
  }
  removeEventListener(...all) {
    this.listeners -= 1;
    super.removeEventListener(...all);
  }
}

// What a page has and Node has not. The client must do without: worker.mjs has nothing of it.
const page = new Target();
for (const name of ["addEventListener", "removeEventListener", "dispatchEvent"]) {
  globalThis[name] = page[name].bind(page);
}
globalThis.document = new Target();

const aisse = await import(path);
let delays = [];
let storage;

// Node's fetch keeps its dispatcher under this name; a first call puts it there.
const DISPATCHER = Symbol.for("undici.globalDispatcher.1");
await fetch("data:,");
const unlimited = globalThis[DISPATCHER];

/** A Storage that notes what is done to it, and can be full, or forbidden altogether. */
class Storage {
  constructor({ entries = {}, full = false }) {
    this.entries = new Map(Object.entries(entries));
    this.full = full;
    this.written = [];
  }
  getItem(name) {
    return this.entries.get(name) ?? null;
  }
  setItem(name, value) {
    if (this.full) throw new DOMException("The quota has been exceeded.", "QuotaExceededError");
    this.written.push(value);
    this.entries.set(name, value);
  }
  removeItem(name) {
    this.entries.delete(name);
  }
}

function patch({ random, quick, insecure, stored, forbidden, connections }) {
  // As many to one server at the same time, as in a browser; others wait in the order in which they came.
  globalThis[DISPATCHER] = connections ? new unlimited.constructor({ connections }) : unlimited;
  Math.random = random === undefined ? native.random : () => random;
  delays = [];
  // The client's own pauses are noted and left out. Those of fetch stay: its clock would run too fast. So do longer
  // ones, which are watchdogs.
  globalThis.setTimeout = (callback, ms, ...rest) => {
    if (!quick || ms > quick || !new Error().stack.split("\n")[2].includes("/aisse.js")) {
      return native.setTimeout(callback, ms, ...rest);
    }
    delays.push(ms);
    return native.setTimeout(callback, 0, ...rest);
  };
  // Pages that came over plain HTTP have none.
  Object.defineProperty(crypto, "randomUUID", { value: insecure ? undefined : native.randomUUID, configurable: true });
  storage = stored && new Storage(stored);
  const get = () => {
    if (forbidden) throw new DOMException("The operation is insecure.", "SecurityError");
    return storage;
  };
  Object.defineProperty(globalThis, "sessionStorage", { get, configurable: true });
}

/** An error as JSON: what a test can compare. */
function told(error) {
  if (error === undefined) return null;
  if (!(error instanceof Error)) return { thrown: error };
  const { name, message, kind, status, type, retryAfter } = error;
  return { name, message, kind, status, type, retryAfter, ours: error instanceof aisse.ChatError };
}

class Run {
  constructor(job) {
    this.job = job;
    this.controller = new AbortController();
    this.taken = []; // by the iteration
    this.seen = []; // by onEvent
    this.texts = [];
    this.thoughts = [];
    this.states = [];
    this.fetched = [];
    this.stops = 0;
    this.counts = new Map();
    this.resume = () => {};
  }

  get options() {
    const { options = {} } = this.job;
    return {
      ...options,
      retries: options.retries === "Infinity" ? Infinity : options.retries,
      signal: this.controller.signal,
      ...(this.job.fetch && { fetch: (url, init) => this.fetched.push(init) && fetch(url, init) }),
      onText: (text) => this.texts.push(this.job.brief ? text.length : text) && this.happened("text"),
      onThinking: (text) => this.thoughts.push(text) && this.happened("thinking"),
      onEvent: (event) => {
        this.seen.push(this.noted(event));
        this.happened(`event:${event.event}`);
      },
      onState: (state, { delayMs, attempt, error }) => {
        this.states.push({ state, delayMs, attempt, error: told(error), at: performance.now() });
        this.happened(`state:${state}`);
      },
    };
  }

  /** A copy, since a tool's event holds an object that grows; with `brief` no more than its place in the answer. */
  noted(event) {
    return structuredClone(this.job.brief ? { id: event.id, event: event.event, type: event.type } : event);
  }

  begin() {
    const { body, after, resume } = this.job;
    if (this.job.before) this.act(this.job.before);
    if (resume === undefined) this.chat = aisse.streamChat(body, this.options);
    else this.chat = aisse.resumeChat(resume, after === undefined ? this.options : { ...this.options, after });
  }

  /** Acts where a rule says so: {at: what happened, nth: from 1, do: what}. */
  happened(what) {
    const count = (this.counts.get(what) ?? 0) + 1;
    this.counts.set(what, count);
    for (const rule of this.job.rules ?? []) {
      if (rule.at === what && (rule.nth ?? 1) === count) return this.act(rule.do);
    }
  }

  act(what) {
    switch (what) {
      case "stop":
        this.chat.stop().then(() => (this.stops += 1));
        return;
      case "stop and detach":
        this.act("stop");
        return this.act("detach");
      case "detach": return this.chat.detach();
      case "reconnect": return this.chat.reconnect();
      case "abort": return this.controller.abort();
      case "abort for a reason": return this.controller.abort(new Error("the page's reason"));
      case "online": return globalThis.dispatchEvent(new Event("online"));
      case "hide":
      case "show":
        document.hidden = what === "hide";
        document.dispatchEvent(new Event("visibilitychange"));
        return;
      case "an hour passes": {
        const clock = performance.now.bind(performance);
        performance.now = () => clock() + 3_600_000;
        return;
      }
      case "throw": throw new Error("the page's own");
      case "throw ours": throw new aisse.ChatError("silent", "the page's own");
      case "freeze": // as a suspended tab: no timer, no byte
        Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, this.job.freeze_ms);
        return;
      case "pause":
        this.paused = new Promise((resolve) => (this.resume = resolve));
        return;
      case "go": return this.resume();
      case "tell": return this.tell(false);
      default: throw new TypeError(`no such action: ${what}`);
    }
  }

  async read() {
    this.begin();
    let thrown;
    if (this.job.at_start) this.act(this.job.at_start);
    try {
      if (this.job.iterate === false) await this.chat.finished;
      else await this.iterate();
    } catch (error) {
      thrown = { error };
    }
    this.thrown = thrown ? told(thrown.error) : null;
    this.finished = await this.chat.finished.then(() => null, told);
  }

  async iterate() {
    for await (const event of this.chat) {
      this.taken.push(this.noted(event));
      if (event.event === this.job.break_at) break;
      if (event.event === this.job.stop_at) await this.chat.stop();
      if (event.event === this.job.pause_at && !this.paused) this.act("pause");
      await this.paused;
    }
  }

  tell(done = true) {
    const { id, cursor, state, text, thinking, tools, usage, reason, error, silenceMs } = this.chat;
    const chat = { id, cursor, state, text: this.job.brief ? text.length : text, thinking, tools, usage, reason, error: told(error), silenceMs };
    const { taken, seen, texts, thoughts, states, thrown, finished, stops } = this;
    const kept = storage && Object.fromEntries(storage.entries);
    say({
      run: this.job.run, done, chat, taken, seen, texts, thoughts, states, thrown, finished, stops, delays, kept,
      written: storage?.written,
      fetched: this.fetched.map(({ method, credentials }) => ({ method, credentials })),
    });
  }
}

function say(line) {
  process.stdout.write(JSON.stringify(line) + "\n");
}

/** Jobs that are no chat. */
const others = {
  parse: (job) => parse(aisse, job),
  listeners: () => page.listeners + document.listeners,
  saved: ({ name }) => aisse.savedChat(name) ?? null,
  // What is thrown where a chat is not even begun.
  create: ({ resume, body, options }) => {
    try {
      if (body) aisse.streamChat(body, options);
      else aisse.resumeChat(resume, options);
      return null;
    } catch (error) {
      return told(error);
    }
  },
};

const runs = new Map();
for await (const line of createInterface({ input: process.stdin })) {
  const job = JSON.parse(line);
  if (job.patch) patch(job.patch);
  else if (runs.has(job.run)) runs.get(job.run).act(job.do);
  else if (job.call) say({ run: job.run, done: true, value: others[job.call](job) });
  else {
    const run = new Run(job);
    runs.set(job.run, run);
    run.read().then(
      () => run.tell(),
      (error) => say({ run: job.run, done: true, broken: error.stack }),
    );
  }
}
