/** The connection of the answer on show: a line of figures, and the last 30 seconds as a plot. */

const BUCKET_MS = 250;
const BUCKETS = 120;
const EVERY_MS = 100;
const WORDS = {
  idle: "Idle", connecting: "Connecting", waiting: "No answer yet", streaming: "Streaming",
  reconnecting: "Reconnecting", ended: "Ended", refused: "Refused", lost: "Lost", detached: "Left",
};

const $ = (id) => document.getElementById(id);
const canvas = $("plot");
const events = new Float32Array(BUCKETS);
const tokens = new Float32Array(BUCKETS);
const broken = new Uint8Array(BUCKETS); // 1 where there was no connection
let answer; // whose connection is shown
let seq = 0;
let bucket = 0; // the running one's number
let ticks;
let cut = false; // there was a connection, and there is none
let size = [0, 0];
let colours = {};

const bucketNow = () => Math.floor(performance.now() / BUCKET_MS);

/** Moves on to now; what fell behind is zero. */
function advance() {
  const to = bucketNow();
  bucket = Math.max(bucket, to - BUCKETS);
  while (bucket < to) {
    bucket += 1;
    events[bucket % BUCKETS] = tokens[bucket % BUCKETS] = 0;
    broken[bucket % BUCKETS] = cut ? 1 : 0;
  }
}

/** Shows `next`, an Answer, or with none that nothing runs. */
export function follow(next) {
  if (next === answer) return;
  answer = next;
  seq = 0;
  cut = false;
  for (const series of [events, tokens, broken]) series.fill(0);
  changed();
}

/** Notes an event of the answer on show. */
export function count({ id, type }) {
  advance();
  events[bucket % BUCKETS] += 1;
  // Deltas that were merged for a reader that was behind have the id of their last.
  const now = +id.slice(id.indexOf(".") + 1);
  if ((type === "text" || type === "thinking") && now > seq) tokens[bucket % BUCKETS] += seq ? now - seq : 1;
  seq = Math.max(seq, now);
}

/** The state may be another one. */
export function changed() {
  const { chat, busy } = answer ?? {};
  const state = chat?.state ?? "idle";
  $("strip").dataset.state = state;
  const reason = chat?.reason ? `: ${chat.reason.replaceAll("_", " ")}` : "";
  $("state").textContent = WORDS[state] + (navigator.onLine ? reason : ", offline");
  $("reconnects").textContent = answer?.reconnects ?? 0;
  if (busy) advance();
  cut = busy && (state === "reconnecting" || (cut && state !== "streaming"));
  if (cut) broken[bucket % BUCKETS] = 1;
  clearInterval(ticks);
  if (busy) ticks = setInterval(tick, EVERY_MS);
  show();
}

function tick() {
  if (!document.hidden) show();
}

/** Of the last whole second. */
function rate(series) {
  let sum = 0;
  for (let back = 1; back <= 1000 / BUCKET_MS; back += 1) sum += series[(bucket - back + BUCKETS) % BUCKETS];
  return sum;
}

function show() {
  const { chat, busy } = answer ?? {};
  if (busy) advance();
  const cursor = chat?.cursor ?? "";
  const streaming = chat?.state === "streaming";
  $("last-id").textContent = cursor ? `${cursor.slice(0, 6)}….${cursor.split(".")[1]}` : "–";
  $("last-id").title = cursor;
  $("events-rate").textContent = busy ? rate(events) : 0;
  $("tokens-rate").textContent = busy ? rate(tokens) : 0;
  $("silence").textContent = streaming ? `${(chat.silenceMs / 1000).toFixed(1)} s ago` : "–";
  draw();
}

function draw() {
  const [width, height] = size;
  const pen = canvas.getContext("2d");
  pen.clearRect(0, 0, width, height);
  const most = Math.max(10, ...tokens, ...events);
  const step = width / (BUCKETS - 2);
  // The running bucket is not full yet: it stays outside, until nothing runs any more.
  const first = bucket + (answer?.busy ? 1 : 2);
  const x = (index) => index * step;
  // By its root: what is caught up on comes in one peak, and must not flatten everything else.
  const y = (value) => height - 1 - Math.sqrt(value / most) * (height - 4);
  const at = (series, index) => series[(first + index) % BUCKETS];
  const trace = (series) => {
    pen.beginPath();
    for (let index = 0; index < BUCKETS - 1; index += 1) pen.lineTo(x(index), y(at(series, index)));
  };
  pen.fillStyle = colours.broken;
  pen.globalAlpha = 0.35;
  for (let index = 0; index < BUCKETS - 1; index += 1) if (at(broken, index)) pen.fillRect(x(index), 0, step, height);
  trace(tokens);
  pen.lineTo(width, height);
  pen.lineTo(0, height);
  pen.fillStyle = colours.tokens;
  pen.globalAlpha = 0.25;
  pen.fill();
  pen.globalAlpha = 1;
  trace(tokens);
  pen.strokeStyle = colours.tokens;
  pen.lineWidth = 1.5;
  pen.stroke();
  trace(events);
  pen.strokeStyle = colours.events;
  pen.lineWidth = 1;
  pen.stroke();
}

function recolour() {
  const style = getComputedStyle(canvas);
  colours = Object.fromEntries(
    [["tokens", "--accent"], ["events", "--quiet"], ["broken", "--error"]].map(([series, name]) => [
      series,
      style.getPropertyValue(name),
    ]),
  );
  draw();
}

new ResizeObserver(([{ contentRect }]) => {
  size = [contentRect.width, contentRect.height];
  canvas.width = size[0] * devicePixelRatio;
  canvas.height = size[1] * devicePixelRatio;
  canvas.getContext("2d").scale(devicePixelRatio, devicePixelRatio);
  draw();
}).observe(canvas);
window.addEventListener("online", changed);
window.addEventListener("offline", changed);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
recolour();
