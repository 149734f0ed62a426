/** The drawer that breaks things on purpose, so that a person can watch nothing get lost. */
import { resumeChat } from "./aisse.js";
import { markdown } from "./markdown.js";
import { CHAT_URL, NO_ANSWER_YET, offline, request, switchNetwork } from "./network.js";

/** What the simulator is told, and what to watch for. */
const FAULTS = {
  none: ["None", "", "The answer comes as it should."],
  error: ["An error in mid-answer", "fault=error at=90", "Watch: the error is named, the text stays."],
  cut: ["The model's connection breaks", "fault=cut at=9000",
    "Watch: a broken answer is never passed off as a whole one: it ends as truncated."],
  stall: ["The model falls silent", "fault=stall at=90",
    "Watch: heartbeats go on, so the silence is the model's, not the connection's. Stop it when you like."],
  garbage: ["Noise instead of events", "fault=garbage at=90", "Watch: none of it reaches this page."],
  huge: ["An event of two megabytes", "fault=huge at=90", "Watch: the server's limit holds, and says so."],
  slow: ["A slow model", "pace=4", "Watch: each word is shown when it comes; nothing waits for a full buffer."],
  long: ["A long, fast answer", "tokens=6000 pace=200", "Watch: 200 events a second, and the page stays at ease."],
  thinking: ["Much thinking first", "thinking_tokens=200", "Watch: thinking is shown apart, and folds itself up."],
  late: ["Late first word", "first_s=8", "Watch: the connection is confirmed after five seconds, before the word."],
  busy: ["Overloaded", "status=529", "Watch: the page tries again, as late as it is told to, with the same key."],
  limited: ["Too many questions", "status=429 retry_after=5", "Watch: that is an answer, and no reason to try again."],
};

const $ = (id) => document.getElementById(id);

function option(value, label) {
  const node = document.createElement("option");
  node.value = value;
  node.append(label);
  return node;
}

function watch() {
  $("fault-watch").textContent = FAULTS[$("fault").value][2];
}

/** Faults are the simulator's; `upstream` is what /health says. */
export function setUpstream(upstream) {
  $("fault").disabled = upstream !== "simulator";
  if (!$("fault").disabled) return watch();
  $("fault-watch").textContent = "Only the built-in simulator fails on request: serve with --upstream simulator.";
}

/** The fault for the next answer, as `{ script, label }`; chosen once, it comes once. */
export function takeFault() {
  const [label, script] = FAULTS[$("fault").value];
  $("fault").value = "none";
  if (!$("fault").disabled) watch();
  return { script, label: script && `Fault: ${label}` };
}

/** `shown()` is the Answer on show, if there is one; `announce(words)` says them. */
export function prepareDrawer(shown, announce, toPrompt) {
  const say = (words) => {
    $("said").textContent = words;
    announce(words);
  };
  $("fault").append(...Object.entries(FAULTS).map(([value, [label]]) => option(value, label)));
  $("fault").addEventListener("change", watch);
  setUpstream();
  $("drop").addEventListener("click", () => {
    const answer = shown();
    if (!answer?.busy) return say("No answer is running: ask something first.");
    answer.chat.reconnect();
    say("Connection dropped.");
  });
  $("offline").addEventListener("click", () => {
    switchNetwork();
    $("offline").ariaPressed = String(offline());
    say(offline() ? "This page is offline." : "This page is online again.");
  });
  $("second").addEventListener("click", () => {
    const answer = shown();
    if (!answer?.chat?.id) return say("There is no stream to read yet: ask something first.");
    openSecond(answer, toPrompt);
    say("A second reader begins.");
  });
}

/** Reads the answer's stream once more, beside it. */
function openSecond(answer, toPrompt) {
  answer.element.querySelector(".second .close")?.click();
  const panel = $("reader").content.firstElementChild.cloneNode(true);
  const [place, close, verdict] = ["code", ".close", ".verdict"].map((name) => panel.querySelector(name));
  const view = markdown(panel.querySelector(".copied"));
  answer.element.querySelector(".text").after(panel);
  const onText = (text) => view.append(text);
  const onState = (state) => (verdict.textContent = state === "waiting" ? NO_ANSWER_YET : "");
  const chat = resumeChat(answer.chat.id, { url: CHAT_URL, fetch: request, onText, onState });
  const ticks = setInterval(() => (place.textContent = chat.cursor.replace(/^.*\./, "event ")), 100);
  const compare = async () => {
    clearInterval(ticks);
    place.textContent = chat.cursor.replace(/^.*\./, "event ");
    await Promise.all([view.finish(), answer.chat.finished.catch(() => {})]);
    const same = view.text === answer.text;
    panel.dataset.same = same;
    verdict.textContent = !chat.reason
      ? `It could not be read: ${chat.error?.message ?? "the panel was closed."}`
      : same
        ? `The same to the character: ${view.text.length.toLocaleString("en")} characters.`
        : `They differ: ${view.text.length} characters here, ${answer.text.length} in the first.`;
  };
  chat.finished.then(compare, compare);
  close.addEventListener("click", () => {
    chat.detach();
    panel.remove();
    if ($("drawer").hidden) toPrompt();
    else $("second").focus();
  });
}
