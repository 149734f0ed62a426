const $ = (id) => document.getElementById(id);
const turns = []; // the conversation, as the API wants it
let answering = null; // while an answer arrives: what it takes to stop it

/** Takes decoded text piece by piece and calls `take` with each event's data, where it is JSON (WHATWG HTML, 9.2.6). */
function parser(take) {
  const dispatch = (text) => {
    let event = null;
    try { event = JSON.parse(text); } catch { /* an upstream's, and not for us */ }
    if (event) take(event);
  };
  let rest = "", data = [], endedInCR = false;
  return (text) => {
    if (text === "") return;
    if (endedInCR && text[0] === "\n") text = text.slice(1); // the second half of a CRLF
    endedInCR = text.endsWith("\r");
    const lines = (rest + text).split(/\r\n|\n|\r/);
    rest = lines.pop();
    for (const line of lines) {
      if (line === "" && data.length) dispatch(data.splice(0).join("\n"));
      else if (/^data(:|$)/.test(line)) data.push(line.slice(5).replace(/^ /, ""));
    }
  };
}

/** Changes the page, and keeps its end in view for a reader who was there. */
function show(change) {
  const view = document.querySelector("main");
  const atEnd = view.scrollHeight - view.scrollTop - view.clientHeight < 40;
  change();
  if (atEnd) view.scrollTop = view.scrollHeight;
}

/** The message of a response that is no stream. */
async function refusal(response) {
  const body = await response.json().catch(() => null);
  const retry = response.headers.get("Retry-After");
  if (response.status === 401) show(() => ($("access").hidden = false));
  return (body?.error?.message ?? `The server answered ${response.status}`) + (retry ? ` (try again in ${retry} s)` : "");
}

async function ask(content) {
  const question = $("log").appendChild(document.createElement("p"));
  const answer = $("log").appendChild($("answer").content.firstElementChild.cloneNode(true));
  const [thoughts, text, problem] = answer.querySelectorAll("p");
  const abort = new AbortController();
  let ended = false;
  const take = ({ type, delta, error, reason, usage }) => show(() => {
    if (type === "content_block_delta" && delta?.thinking) {
      thoughts.parentElement.hidden = false;
      thoughts.append(delta.thinking);
    } else if (type === "content_block_delta" && delta?.text) {
      if (!text.firstChild) thoughts.parentElement.open = false;
      text.append(delta.text);
    } else if (type === "error") problem.append(error.message);
    else if (type === "end") {
      ended = true;
      $("status").textContent =
        `${reason.replaceAll("_", " ")} · ${usage?.input_tokens ?? "?"} tokens in, ${usage?.output_tokens ?? "?"} out`;
    }
  });

  answering = { abort, url: null };
  turns.push({ role: "user", content });
  question.textContent = content;
  question.scrollIntoView();
  answer.ariaBusy = "true"; // screen readers wait for the whole
  $("hint").hidden = true;
  $("send").textContent = "Stop";
  $("status").textContent = "waiting …";
  try {
    const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
    if ($("token").value) headers.Authorization = `Bearer ${$("token").value}`;
    const body = JSON.stringify({ messages: turns });
    const response = await fetch("/api/chat", { method: "POST", headers, body, signal: abort.signal });
    if (!response.ok) throw new Error(await refusal(response));
    answering.url = response.headers.get("Content-Location");
    $("access").hidden = true;
    $("status").textContent = "answering …";
    const feed = parser(take), decoder = new TextDecoder(), reader = response.body.getReader();
    for (let part; !(part = await reader.read()).done; ) feed(decoder.decode(part.value, { stream: true }));
    if (!ended) throw new Error("The answer broke off.");
  } catch (error) {
    const stopped = abort.signal.aborted;
    $("status").textContent = stopped ? "stopped" : "";
    if (!stopped) show(() => problem.append(error instanceof TypeError ? "The connection was lost." : error.message));
  }
  abort.abort(); // also where reading failed
  answer.normalize(); // one text node again, of thousands
  answer.ariaBusy = "false";
  answering = null;
  $("send").textContent = "Send";
  if (text.textContent.trim()) turns.push({ role: "assistant", content: text.textContent });
  else {
    turns.pop(); // unanswered: it can be sent again
    $("prompt").value ||= content;
  }
  if (!$("access").hidden) $("token").focus();
}

/** Ends the generation at the server, which then says `end`; where that fails, we leave. */
async function stop({ abort, url }) {
  const stopped = url && (await fetch(url, { method: "DELETE" }).catch(() => null));
  if (!stopped?.ok) abort.abort();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) return stop(answering);
  const content = $("prompt").value.trim();
  $("prompt").value = "";
  if (content) ask(content);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && answering) stop(answering);
  if (event.target !== $("prompt") || event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!answering) $("composer").requestSubmit();
});

const named = { simulator: "the built-in simulator: scripted text, no model", local: "a small model on this machine" };
fetch("/health")
  .then((response) => response.json())
  .then(({ upstream }) => ($("upstream").textContent = `Answered by ${named[upstream] ?? upstream}`))
  .catch(() => ($("upstream").textContent = "The server does not answer"));
