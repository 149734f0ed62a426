/** One question and its answer: what they look like, and the life of the connection behind them. */
import { resumeChat, savedChat, streamChat } from "./aisse.js";
import { markdown } from "./markdown.js";
import { CHAT_URL, NO_ANSWER_YET, offline, request } from "./network.js";

/** Longer pauses would try a person's patience; beside them is a button for now. */
const MAX_DELAY_MS = 10_000;
/** A shorter pause is over before anybody could read about it. */
const NOTICE_FROM_MS = 400;

const ENDS = {
  error: "The model's server reported an error",
  truncated: "The model's server broke off",
  timeout: "The model took too long",
  limit: "The answer outgrew what this server keeps",
  shutdown: "The server was shut down",
  producer_lost: "The server that wrote this answer died",
  abandoned: "Nobody was reading, so the answer was given up",
};

const plural = (count = 0, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
const seconds = (ms) => plural(Math.max(1, Math.ceil(ms / 1000)), "second");
const sentence = (words) => (/[.!?]$/.test(words) ? words : `${words}.`);

/** What happened, and what can be done about it. */
function explain({ kind, message, status, retryAfter }, reason) {
  if (kind === "failed") return sentence(`${ENDS[reason] ?? "The answer ended early"}: ${message}`);
  if (kind === "lost" && status) return "The server no longer has this answer. What came of it is kept here.";
  if (kind === "lost") {
    return `The connection was lost. ${sentence(message)} What came is kept; “Reconnect” goes on from there.`;
  }
  if (status === 413) return `${sentence(message)} A shorter question, or a new conversation, may fit.`;
  if (retryAfter) return `${sentence(message)} Try again in ${seconds(1000 * retryAfter)}.`;
  return sentence(message);
}

/** Puts `words` on the clipboard; pages without TLS have the old way only. */
async function copy(words) {
  if (navigator.clipboard) return navigator.clipboard.writeText(words);
  const field = document.createElement("textarea");
  field.value = words;
  field.className = "unseen";
  document.body.append(field);
  const focused = document.activeElement;
  field.select();
  document.execCommand("copy");
  field.remove();
  focused?.focus({ preventScroll: true });
}

/** Tells by the button itself that it copied. */
async function copyBy(button, words) {
  await copy(words);
  button.dataset.done = "true";
  setTimeout(() => delete button.dataset.done, 1500);
}

/** Adds to a block of code a button that copies it, with all that was cut off from it. */
function copyable(block) {
  const button = document.createElement("button");
  button.type = "button";
  button.className = "copy-code";
  button.ariaLabel = "Copy code"; // its visible text is the style sheet's, so that it is no part of the answer's
  button.addEventListener("click", () => {
    const blocks = [...block.closest(".text").querySelectorAll(".code")];
    const first = blocks.indexOf(block);
    const next = blocks.findIndex((one, index) => index > first && !one.classList.contains("continued"));
    const parts = blocks.slice(first, next < 0 ? undefined : next);
    copyBy(button, parts.map((one) => one.querySelector("pre").textContent).join(""));
  });
  block.prepend(button);
}

export class Answer {
  reconnects = 0;
  busy = false;
  chat;
  #turn;
  #page; // see `page` in chat.js
  #keep;
  #parts;
  #text;
  #thinking;
  #streams = 0;
  #nextAt = 0;
  #countdown;
  #outage = false;
  #leaving = false;
  #isLeft = false;
  #end; // what `#rest` is to show once all text is

  constructor(turn, keep, page) {
    this.#turn = turn;
    this.#keep = keep;
    this.#page = page;
    this.question = document.createElement("p");
    this.question.className = "question";
    this.question.dir = "auto";
    this.question.append(turn.question);
    if (turn.label) this.question.dataset.label = turn.label;
    this.element = document.getElementById("answer").content.firstElementChild.cloneNode(true);
    this.#parts = Object.fromEntries(
      ["thinking", "thoughts", "text", "notice", "now", "problem", "outcome", "copy", "back"].map((name) => [
        name,
        this.element.querySelector(`.${name}`),
      ]),
    );
    const { thinking, thoughts, text, now, copy: copyButton, back } = this.#parts;
    this.#text = markdown(text, { onCode: copyable });
    this.#thinking = markdown(thoughts);
    thinking.querySelector("summary").addEventListener("click", () => (thinking.dataset.toggled = "true"));
    now.addEventListener("click", () => {
      this.chat.reconnect();
      page.toPrompt(); // this button is about to vanish
    });
    copyButton.addEventListener("click", () => copyBy(copyButton, this.text));
    back.addEventListener("click", () => {
      this.resume();
      page.toPrompt();
    });
    if (turn.thinking) this.#think(turn.thinking);
    if (turn.text) this.#write(turn.text);
    const { problem, outcome } = turn;
    this.#rest(outcome === "" && !problem ? { problem: "The page was left before this answer ended." } : turn);
  }

  /** What was asked, without what was added to it. */
  get asked() {
    return this.#turn.question;
  }

  get text() {
    return this.#text.text;
  }

  /** All of it as texts, to be stored. */
  record() {
    const { id = "", cursor = "" } = this.chat ?? this.#turn;
    const { problem = "", outcome = "" } = this.#end ?? {};
    return { ...this.#turn, id, cursor, text: this.text, thinking: this.#thinking.text, problem, outcome };
  }

  ask(messages) {
    this.#follow((options) => streamChat({ messages }, options));
  }

  /** Goes on where this answer was left, by the connection or by an earlier load of the page. */
  resume() {
    const { id, cursor } = this.record();
    const saved = savedChat(this.#keep) ?? { id };
    this.#follow((options) => {
      try {
        if (cursor) return resumeChat(id, { ...options, after: cursor });
      } catch {
        // What was stored is damaged: from the beginning, then.
      }
      this.#clear();
      return resumeChat(saved, options);
    });
  }

  /** Ends the generation; a second time, where the server cannot be told, leaves it. */
  stop() {
    if (!this.busy) return;
    if (this.stopping) {
      this.#leaving = true;
      return this.chat.detach();
    }
    this.stopping = true;
    this.#page.announce("Stopping");
    this.chat.stop();
  }

  /** Another question was asked: what is kept is that one's, and this answer is not gone on with. */
  leave() {
    this.#isLeft = true;
    this.#parts.back.hidden = true;
  }

  #clear() {
    for (const name of ["text", "thoughts"]) this.#parts[name].replaceChildren();
    this.#text = markdown(this.#parts.text, { onCode: copyable });
    this.#thinking = markdown(this.#parts.thoughts);
  }

  #follow(start) {
    const token = document.getElementById("token").value;
    // It is a header's value: what cannot be one would throw.
    const headers = token && /^[\x21-\x7e]+$/.test(token) ? { Authorization: `Bearer ${token}` } : {};
    this.#rest({});
    this.busy = true;
    this.stopping = this.#leaving = false;
    this.element.ariaBusy = "true";
    this.element.querySelector("footer").hidden = true;
    const chat = (this.chat = start({
      url: CHAT_URL,
      keep: this.#keep,
      headers,
      fetch: request,
      maxDelayMs: MAX_DELAY_MS,
      onText: (text) => this.#write(text),
      onThinking: (text) => this.#think(text),
      onEvent: (event) => this.#page.arrived(this, event),
      onState: (state, detail) => this.#changed(state, detail),
    }));
    chat.finished.then(
      () => this.#settle(chat),
      (error) => this.#settle(chat, error),
    );
  }

  #write(text) {
    const { thinking } = this.#parts;
    if (!this.text && !thinking.dataset.toggled) thinking.open = false;
    this.#text.append(text);
  }

  #think(text) {
    this.#parts.thinking.hidden = false;
    this.#thinking.append(text);
  }

  #changed(state, { delayMs, error }) {
    if (state === "streaming") {
      // To stop takes a connection of its own.
      if (!this.stopping || !this.#streams) this.#streams += 1;
      this.reconnects = this.#streams - 1;
      if (this.#outage) this.#page.announce("Connected again");
      this.#outage = false;
      this.#notice();
    } else if (state === "reconnecting" && delayMs > NOTICE_FROM_MS) {
      this.#nextAt = performance.now() + delayMs;
      if (!this.#outage) this.#page.announce("Connection lost, reconnecting");
      this.#outage = true;
      this.#notice(error);
    } else if (state === "waiting" && !this.#outage) {
      this.#page.announce("No answer yet");
      this.#notice(undefined, NO_ANSWER_YET);
    }
    this.#page.changed(this);
  }

  /** Says when the next attempt comes, and why there has to be one; without `error`, `said`. */
  #notice(error, said = "") {
    const { notice, now } = this.#parts;
    const words = notice.querySelector("p");
    clearTimeout(this.#countdown);
    if (!error && notice.contains(document.activeElement)) this.#page.toPrompt();
    notice.hidden = !error && !said;
    now.hidden = !error;
    words.textContent = said;
    if (!error) return;
    const left = this.#nextAt - performance.now();
    const known = error.kind === "unreachable" ? "" : sentence(error.message);
    const cause = navigator.onLine && !offline() ? known : "You are offline.";
    words.textContent = `${this.#streams ? "Connection lost" : "Not connected"}, trying again ` +
      `${left > 0 ? `in ${Math.ceil(left / 1000)} s` : "now"}. ${cause}`;
    if (left > 0) this.#countdown = setTimeout(() => this.#notice(error), Math.min(1000, left));
  }

  async #settle(chat, error) {
    const { reason, usage } = chat;
    this.busy = false;
    this.#outage = false;
    this.#notice();
    this.#page.changed(this);
    if (error?.status === 401 && !this.text) return this.#page.refused(this);
    const left = this.#leaving && chat.id && !reason;
    const outcome = [
      reason === "complete" ? "Complete" : !this.stopping ? "Incomplete" : left ? "Left" : "Stopped",
      reason === "complete" && usage && `${plural(usage.input_tokens, "token")} in`,
      reason === "complete" && usage && `${plural(usage.output_tokens, "token")} out`,
      this.reconnects > 0 && plural(this.reconnects, "reconnect"),
    ].filter(Boolean);
    const problem = error && !(this.stopping && chat.state === "detached") ? explain(error, reason) : "";
    const back = error?.kind === "lost" && !error.status && (chat.id || savedChat(this.#keep)) ? "true" : "";
    this.#end = { problem, outcome: outcome.join(" · "), back };
    this.#page.ended(this); // a long answer is shown a while after it ended, and a hidden page may never get there
    await Promise.all([this.#text.finish(), this.#thinking.finish()]);
    if (this.busy) return; // asked to go on meanwhile
    this.#rest(this.#end);
    this.#page.changed(this, true);
  }

  /** Shows how it ended. */
  #rest({ problem = "", outcome = "", back = "" }) {
    this.#end = { problem, outcome, back };
    this.element.ariaBusy = "false";
    this.element.querySelector("footer").hidden = false;
    this.#parts.problem.textContent = problem;
    this.#parts.problem.hidden = !problem;
    this.#parts.outcome.textContent = outcome;
    this.#parts.back.hidden = !back || this.#isLeft;
    this.#parts.copy.hidden = !this.text;
  }
}
