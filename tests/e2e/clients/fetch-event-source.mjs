// All of a browser that the library asks for.
globalThis.window = globalThis;
globalThis.document = { hidden: false, addEventListener() {}, removeEventListener() {} };

import { work } from "./job.mjs";
const { fetchEventSource } = await import("@microsoft/fetch-event-source");

await work(async (job, run) => {
  const events = [];
  await fetchEventSource(run.origin + "/api/chat", {
    method: "POST",
    headers: { "Content-Type": "application/json", ...run.headers },
    body: JSON.stringify(run.body),
    onmessage: (message) => events.push([message.event, message.data, message.id]),
  });
  return { events };
});
