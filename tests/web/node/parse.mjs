import { readFileSync } from "node:fs";

/** What a parser says of a stream that comes in these pieces of bytes, through a decoder as in a page. */
function outcome(createParser, pieces, maxLength) {
  const events = [];
  const seen = { events, id: "", retry: null, error: null };
  const feed = createParser(
    { onEvent: (event) => events.push(event), onId: (id) => (seen.id = id), onRetry: (ms) => (seen.retry = Number.isInteger(ms) ? ms : `${ms}`) },
    ...(maxLength ? [maxLength] : []),
  );
  const decoder = new TextDecoder();
  try {
    for (const piece of pieces) feed(decoder.decode(piece, { stream: true }));
  } catch (error) {
    seen.error = error.name;
  }
  return seen;
}

function inPieces(bytes, size) {
  return Array.from({ length: Math.ceil(bytes.length / size) }, (_, at) => bytes.subarray(at * size, (at + 1) * size));
}

/** Shortest of three times to parse so much text in small pieces; CPU time, which neighbours do not change much. */
function costs(createParser, text, size) {
  const pieces = Array.from({ length: Math.ceil(text.length / size) }, (_, at) => text.slice(at * size, (at + 1) * size));
  const times = [1, 2, 3].map(() => {
    let events = 0;
    const feed = createParser({ onEvent: ({ data }) => (events += data.length > 0) });
    const before = process.cpuUsage();
    for (const piece of pieces) feed(piece);
    const { user, system } = process.cpuUsage(before);
    if (events !== 1) throw new Error(`${events} events`);
    return user + system;
  });
  return Math.min(...times);
}

/** {files} each in all ways, {pieces} as they are, or {long}: what events of [head, unit, times, piece's size] cost. */
export function parse({ createParser }, { files, pieces, maxLength, long }) {
  if (pieces) return outcome(createParser, pieces.map((piece) => Buffer.from(piece, "base64")), maxLength);
  if (long) return long.map(([head, unit, times, size]) => costs(createParser, head + unit.repeat(times) + "\n\n", size));
  return files.map((file) => {
    const bytes = readFileSync(file);
    const ofAll = (...parts) => outcome(createParser, parts);
    const whole = ofAll(bytes);
    const same = JSON.stringify(whole);
    const closed = ofAll(bytes, Buffer.from("\n\n"));
    const more = ofAll(bytes, Buffer.from("\n\ndata: more\n\n"));
    return {
      whole,
      bytes: ofAll(...inPieces(bytes, 1)),
      splits: Array.from({ length: bytes.length + 1 }, (_, at) => at).filter(
        (at) => JSON.stringify(ofAll(bytes.subarray(0, at), bytes.subarray(at))) !== same,
      ),
      closed,
      more,
    };
  });
}
