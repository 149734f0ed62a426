// The same relay in Node: Express, node-fetch, pipeline. Usage: node server.mjs UPSTREAM; prints its own address.
import http from "node:http";
import { pipeline } from "node:stream/promises";
import express from "express";
import fetch from "node-fetch";

const upstream = process.argv[2];
const agent = new http.Agent({ keepAlive: true, maxSockets: Infinity });
const app = express();
app.use(express.json());

app.post("/api/chat", async (req, res) => {
  const answer = await fetch(`${upstream}/v1/messages`, {
    method: "POST",
    headers: { "content-type": "application/json", accept: "text/event-stream" },
    body: JSON.stringify({ model: "bench", max_tokens: 4096, stream: true, ...req.body }),
    agent,
  });
  res.status(answer.status);
  res.set({ "Content-Type": "text/event-stream", "Cache-Control": "no-cache" });
  res.flushHeaders();
  try {
    await pipeline(answer.body, res);
  } catch (error) {
    if (error.code !== "ERR_STREAM_PREMATURE_CLOSE") throw error; // the reader left: pipeline has closed both ends
  }
});

const server = app.listen({ port: 0, host: "127.0.0.1", backlog: 4096 }, () => {
  console.log(`http://127.0.0.1:${server.address().port}`);
});
