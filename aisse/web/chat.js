/** The page: which conversation is shown, and what keys and buttons do. */
import { savedChat } from "./aisse.js";
import { Conversation } from "./conversation.js";
import { prepareDrawer, setUpstream, takeFault } from "./drawer.js";
import { EXAMPLES } from "./examples.js";
import { answerOf, conversations, current, setCurrent } from "./history.js";
import * as strip from "./strip.js";

const $ = (id) => document.getElementById(id);
const view = document.querySelector("main");
const touch = matchMedia("(pointer: coarse)");
const READ_ALOUD_CHARS = 400;
const END_PX = 60;

/** What the answers tell. */
const page = {
  /** Another state; `over`: all of it is on the page, and nothing more comes. */
  changed(answer, over = false) {
    if (over) finished(answer);
    if (answer !== shown.last) return listConversations();
    refresh();
    strip.changed();
  },
  /** Nothing more comes, but not all of it may be on the page yet. */
  ended(answer) {
    unstored.add(answer);
    setTimeout(storeAll); // megabytes take as long as a frame
  },
  arrived(answer, event) {
    if (answer === shown.last) strip.count(event);
  },
  /** For want of an access token. */
  refused(answer) {
    const conversation = [...visited.values()].find(({ last }) => last === answer);
    conversation.drop();
    const { value } = $("prompt");
    $("prompt").value = value ? `${answer.asked}\n\n${value}` : answer.asked;
    $("access").hidden = false;
    announce("This server asks for an access token");
    refresh();
    $("token").focus();
  },
  announce,
  toPrompt,
};

const unstored = new Set(); // answers that have just ended
const visited = new Map(); // conversations that were on show since the page was loaded, by id
let shown;
let upstream;
let following = true; // the person is at the end of the conversation, and wants to stay there
let lastTop = 0;
let listed = ""; // what the list of conversations shows

// --- what is on show ------------------------------------------------------------------------------------------------

function show(conversation) {
  shown = conversation;
  visited.set(shown.id, shown);
  setCurrent(shown.id);
  $("log").replaceChildren(shown.element);
  toEnd();
  refresh();
}

/** Brings all but the answers up to date. */
function refresh() {
  const { busy, last } = shown;
  const state = last?.chat?.state;
  strip.follow(last?.chat && last);
  $("empty").hidden = Boolean(last);
  $("send").textContent = busy ? "Stop" : "Send";
  $("send").className = busy ? "stop" : "";
  const doings = { reconnecting: "Reconnecting … ", waiting: "Waiting … " };
  const doing = !busy ? "" : (doings[state] ?? "Answering … ");
  document.title = `${doing}${shown.title || "aisse"}`;
  listConversations();
}

function listConversations() {
  const items = conversations().map(({ id, title }) => [id, title, id === shown.id, visited.get(id)?.busy]);
  if (listed === (listed = JSON.stringify(items))) return;
  const focused = document.activeElement?.dataset.id;
  $("history").querySelector("ul").replaceChildren(...items.map(([id, title, isShown, busy]) => {
    const item = document.createElement("li");
    const button = item.appendChild(document.createElement("button"));
    button.type = "button";
    button.dir = "auto";
    button.dataset.id = id;
    button.textContent = title;
    if (isShown) button.ariaCurrent = "true";
    if (busy) button.className = "busy";
    if (id === focused) setTimeout(() => button.focus());
    return item;
  }));
}

function announce(words) {
  $("live").textContent = words;
}

/** Tells what cannot be seen: the words themselves where they are few. */
function finished(answer) {
  const problem = answer.element.querySelector(".problem").textContent;
  const end = problem || (answer.stopping ? "Stopped." : "Answer complete.");
  const { length } = answer.text;
  if (answer !== shown.last) return announce(`${end} It answers “${answer.asked}”.`);
  announce(`${end} ${length > READ_ALOUD_CHARS ? `${length.toLocaleString("en")} characters.` : answer.text}`);
}

function storeAll() {
  for (const conversation of visited.values()) {
    for (const answer of unstored) if (conversation.has(answer)) conversation.store(answer);
  }
  unstored.clear();
}

// --- asking ---------------------------------------------------------------------------------------------------------

function ask(question) {
  const fault = takeFault();
  const script = upstream === "simulator" && EXAMPLES.find((one) => one.question === question)?.script;
  shown.ask(question, { script: [script, fault.script].filter(Boolean).join(" "), label: fault.label });
  announce("Answering");
  toEnd();
  refresh();
}

function toPrompt() {
  if (!touch.matches) $("prompt").focus({ preventScroll: true }); // there the keyboard would cover the answer
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  toPrompt();
  if (shown.busy) return shown.last.stop();
  const question = $("prompt").value.trim();
  if (!question) return;
  $("prompt").value = "";
  $("access").hidden = true;
  ask(question);
});

// The second click of two was meant for what the button said before.
$("send").addEventListener("click", (event) => {
  if (event.detail > 1 && shown.busy) event.preventDefault();
});

$("log").addEventListener("click", ({ target }) => {
  if (!target.matches(".again") || shown.busy) return;
  const { asked } = shown.last;
  shown.drop();
  toPrompt();
  ask(asked);
});

$("examples").append(...EXAMPLES.map(({ question }) => {
  const item = document.createElement("li");
  const button = item.appendChild(document.createElement("button"));
  button.type = "button";
  button.textContent = question;
  button.addEventListener("click", () => {
    toPrompt();
    ask(question);
  });
  return item;
}));

// --- panels and keys ------------------------------------------------------------------------------------------------

const panels = { history: $("history-toggle"), drawer: $("drawer-toggle") };

function toggle(name, opened = panels[name].ariaExpanded !== "true") {
  panels[name].ariaExpanded = String(opened);
  $(name).classList.toggle("open", opened);
  if (name === "drawer") $(name).hidden = !opened;
  if (opened) ($(name).querySelector("button") ?? $(name)).focus();
}

/** Closes the panel that `name` names, if it is open, and gives the focus back. */
function close(name) {
  if (panels[name].ariaExpanded !== "true") return false;
  const inside = $(name).contains(document.activeElement);
  toggle(name, false);
  if (inside) panels[name].focus();
  return true;
}

for (const name of Object.keys(panels)) panels[name].addEventListener("click", () => toggle(name));
// Where it covers the page it goes when the person goes on elsewhere.
const leaveHistory = (to) => to && !$("history").contains(to) && to !== panels.history && close("history");
$("history").addEventListener("focusout", ({ relatedTarget }) => leaveHistory(relatedTarget));
document.addEventListener("pointerdown", ({ target }) => leaveHistory(target));
for (const name of Object.keys(panels)) $(`${name}-close`).addEventListener("click", () => close(name));
$("new").addEventListener("click", () => {
  if (shown.last) show(new Conversation(page));
  $("prompt").focus();
});
$("history").addEventListener("click", ({ target }) => {
  const { id } = target.dataset;
  if (!id) return;
  close("history");
  show(visited.get(id) ?? new Conversation(page, id));
  toPrompt();
});

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.keyCode === 229) return; // Safari's Enter that ends a composition has 229 alone
  if (event.key === "Escape") {
    const writing = document.activeElement === $("prompt");
    if (!(shown.busy && writing) && (close("history") || close("drawer"))) return;
    if (shown.busy) shown.last.stop();
  } else if (event.target === $("prompt") && event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    if (!shown.busy) $("composer").requestSubmit();
  }
});

// --- the end of the conversation ------------------------------------------------------------------------------------

function toEnd() {
  following = true;
  view.scrollTop = view.scrollHeight;
}

view.addEventListener("scroll", () => {
  const top = view.scrollTop;
  const atEnd = view.scrollHeight - top - view.clientHeight < END_PX;
  // What grows below is no reason to stay behind; going up is, by however little. What shrank ends at its end.
  if (top < lastTop && view.scrollHeight - top - view.clientHeight > 1) following = false;
  else if (atEnd && top > lastTop) following = true;
  lastTop = top;
  $("to-end").hidden = following;
}, { passive: true });

// Called once the frame is laid out: asking for the height costs nothing here.
const grown = new ResizeObserver(() => {
  if (!following) return;
  view.scrollTop = view.scrollHeight;
  lastTop = view.scrollTop; // a step back from here is the person's
});
grown.observe($("log"));
grown.observe(view);
$("to-end").addEventListener("click", () => {
  toEnd();
  $("to-end").hidden = true;
  toPrompt();
});

// --- beginning and end of the page ----------------------------------------------------------------------------------

window.addEventListener("pagehide", () => {
  for (const conversation of visited.values()) if (conversation.busy) unstored.add(conversation.last);
  storeAll();
});

const named = { simulator: "the built-in simulator: scripted text, no model", local: "a small model on this machine" };
fetch("health")
  .then((response) => (response.ok ? response.json() : {}))
  .then((health) => {
    ({ upstream } = health);
    if (upstream) $("upstream").textContent = `Answered by ${named[upstream] ?? upstream}`;
    setUpstream(upstream);
  })
  .catch(() => ($("upstream").textContent = "The server does not answer"));

prepareDrawer(() => shown.last, announce, toPrompt);
const known = conversations().map(({ id }) => id);
const before = current();
show(new Conversation(page, known.includes(before) ? before : ""));
// Answers that ran where the person was not looking go on, too.
for (const id of known) if (id !== before && savedChat(answerOf(id))) visited.set(id, new Conversation(page, id));
