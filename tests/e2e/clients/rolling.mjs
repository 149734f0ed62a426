import { EventSource } from "eventsource";
import { setTimeout as sleep } from "node:timers/promises";

// Keeps answers running, each read by an EventSource that reconnects by itself. The job comes as the first line on
// standard input: {origin, streams, pace, longest_s, endless_in}; a second line, or the end, says to ask no more. Each
// answer's outcome leaves as one line of JSON once it has ended.
const TYPES = ["message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta",
  "message_stop", "ping", "reconnect", "end"];

let stopped = false;
const job = await new Promise((resolve) => {
  let text = "";
  process.stdin.setEncoding("utf8");
  process.stdin.on("data", (data) => {
    text += data;
    const lines = text.split("\n");
    if (lines.length > 1) resolve(JSON.parse(lines[0]));
    if (lines.length > 2) stopped = true;
  });
  process.stdin.on("end", () => { stopped = true; });
});

async function ask(tokens) {
  const text = `[[tokens=${tokens} pace=${job.pace}]]`;
  const asked = await fetch(job.origin + "/api/chat", {
    method: "POST",
    headers: { "Content-Type": "application/json", Prefer: "respond-async" },
    body: JSON.stringify({ messages: [{ role: "user", content: text }] }),
  });
  if (asked.status !== 202) return { refused: asked.status, text: (await asked.text()).slice(0, 200) };
  const { url } = await asked.json();
  const seen = { id: url.slice(-22), last: 0, lost: 0, doubled: 0, ends: 0, reason: null, told: 0, pauses_s: [], code: 0 };
  let broken = false; // and not yet heard of again
  let asking = 0; // when it came back, by its own delay
  const source = new EventSource(job.origin + url, {
    fetch: (input, init) => {
      if (broken && !asking) asking = performance.now();
      return fetch(input, init);
    },
  });
  function take(event) {
    if (event.type === "reconnect") {
      seen.told += 1;
      return;
    }
    if (asking) seen.pauses_s.push((performance.now() - asking) / 1000);
    broken = false;
    asking = 0;
    const seq = +event.lastEventId.split(".")[1];
    if (seq <= seen.last) seen.doubled += 1;
    else if (seq !== seen.last + 1) seen.lost += 1;
    seen.last = Math.max(seen.last, seq);
    if (event.type === "end") {
      seen.ends += 1;
      seen.reason = JSON.parse(event.data).reason;
    }
  }
  for (const type of TYPES) source.addEventListener(type, take);
  await new Promise((resolve) => {
    source.addEventListener("error", (event) => {
      if (event.data !== undefined) take(event);
      else if (source.readyState === EventSource.CLOSED) resolve((seen.code = event.code));
      else broken = true;
    });
  });
  return seen;
}

async function askOn(_, number) {
  await sleep(Math.random() * job.longest_s * 500);
  while (!stopped) {
    const endless = Math.random() < 1 / job.endless_in;
    const length_s = 0.5 + Math.random() * (job.longest_s - 0.5);
    let outcome;
    try {
      outcome = await ask(endless ? 1_000_000 : Math.max(1, Math.round(length_s * job.pace)));
    } catch (error) {
      outcome = { refused: "nothing", text: String(error.cause ?? error) };
    }
    process.stdout.write(JSON.stringify({ ...outcome, endless }) + "\n");
    if (outcome.refused) await sleep(500);
  }
}

await Promise.all(Array.from({ length: job.streams }, askOn));
process.exit(0); // whatever else still holds connections
