import { EventSource } from "eventsource";
import { work } from "./job.mjs";

await work(async (job, run) => {
  const asked = await fetch(job.server + "/api/chat", {
    method: "POST",
    headers: { "Content-Type": "application/json", Prefer: "respond-async" },
    body: JSON.stringify(run.body),
  });
  const { url } = await asked.json();
  const events = [];
  const source = new EventSource(run.origin + url);
  for (const type of job.types) {
    source.addEventListener(type, (event) => events.push([event.type, event.data, event.lastEventId]));
  }
  const code = await new Promise((resolve) => {
    source.onerror = (event) => {
      if (source.readyState === EventSource.CLOSED) resolve(event.code);
    };
  });
  return { events, code };
});
