// The client in a worker, whose global scope has no window, no storage and no `online`.
import { Worker, isMainThread, parentPort, workerData } from "node:worker_threads";
import { fileURLToPath } from "node:url";

if (isMainThread) {
  const [, , path, url, body] = process.argv;
  const worker = new Worker(fileURLToPath(import.meta.url), { workerData: { path, url, body } });
  worker.on("message", (outcome) => process.stdout.write(JSON.stringify(outcome)));
} else {
  const { streamChat, savedChat } = await import(workerData.path);
  const chat = streamChat(JSON.parse(workerData.body), { url: workerData.url, keep: "chat" });
  let events = 0;
  for await (const event of chat) events += event.type !== "reconnect";
  const { text, reason } = chat;
  parentPort.postMessage({ text, reason, events, saved: savedChat("chat") ?? null });
}
