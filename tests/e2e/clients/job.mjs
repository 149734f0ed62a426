import { setTimeout as sleep } from "node:timers/promises";

// A job comes on standard input: {server, types, at_once, apart_s, runs: [{run, origin, body, headers}]}. Each
// run's outcome leaves as one line of JSON on standard output as soon as it is known.
export async function work(read) {
  const chunks = [];
  for await (const chunk of process.stdin) chunks.push(chunk);
  const job = JSON.parse(Buffer.concat(chunks));
  const waiting = [...job.runs];
  async function readOneByOne(_, index) {
    await sleep(1000 * job.apart_s * index);
    for (let run = waiting.shift(); run !== undefined; run = waiting.shift()) {
      const outcome = await read(job, run);
      process.stdout.write(JSON.stringify({ run: run.run, ...outcome }) + "\n");
    }
  }
  await Promise.all(Array.from({ length: job.at_once }, readOneByOne));
}
