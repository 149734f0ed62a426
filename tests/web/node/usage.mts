// Every export of the client and every field, as a page would use them: compiled, never run.
import { ChatError, createParser, resumeChat, savedChat, streamChat } from "aisse";
import type {
  Chat, ChatEvent, ChatOptions, ChatRequest, ChatState, EndReason, SavedChat, ServerEvent, StateDetail, Tool, Usage,
} from "aisse";

const body: ChatRequest = {
  messages: [{ role: "user", content: "Why?" }, { role: "assistant", content: [{ type: "text", text: "Because" }] }],
  model: "m", max_tokens: 5, system: "Short.", temperature: 0.5,
};
const states: Record<ChatState, boolean> = {
  connecting: false, waiting: false, streaming: false, reconnecting: false, ended: true, refused: true, lost: true,
  detached: true,
};
const whole: Record<EndReason, boolean> = {
  complete: true, stopped: true, abandoned: false, error: false, truncated: false, timeout: false, limit: false,
  shutdown: false, producer_lost: false,
};
const kinds: Record<ChatError["kind"], true> = {
  refused: true, lost: true, failed: true, unreachable: true, unavailable: true, silent: true, broken: true, moved: true,
};
const options: ChatOptions = {
  url: "https://example.org/api/chat", headers: { Authorization: "Bearer t" }, credentials: "include",
  signal: new AbortController().signal, retries: Infinity, maxDelayMs: 1000, heartbeatMs: 5000, keep: "chat", fetch,
  onText: (text) => text.trim(),
  onThinking: (text) => text.trim(),
  onEvent: (event: ChatEvent) => event.id.trim() + event.event.trim(),
  onState(state, { delayMs, attempt, error }: StateDetail) {
    console.log(states[state], (delayMs ?? 0) + (attempt ?? 0), error?.kind);
  },
};

export async function use(): Promise<string> {
  const chat: Chat = streamChat(body, options);
  for await (const event of chat) {
    if (event.type === "text" || event.type === "thinking") console.log(event.text.length);
    else if (event.type === "tool") show(event.tool);
    else if (event.type === "error") console.log(event.error.type, event.error.message);
    else if (event.type === "end") count(event.usage, whole[event.reason]);
    else if (event.type === "reconnect") console.log(event.resume ? "moves" : "stays");
    else console.log(event.data.type);
  }
  const tools: readonly Tool[] = chat.tools;
  tools.map(show);
  const failure: ChatError | undefined = chat.error;
  if (failure) console.log(kinds[failure.kind], failure.status, failure.type, failure.retryAfter, failure.message);
  await chat.stop();
  await chat.finished;
  chat.reconnect();
  chat.detach();
  // @ts-expect-error: what the server says is read
  chat.text = "";
  // @ts-expect-error: there has to be a question
  streamChat({});
  return [chat.id, chat.cursor, chat.state, chat.text, chat.thinking, chat.reason, chat.silenceMs].join();
}

export function back(): Chat {
  const saved: SavedChat | undefined = savedChat("chat");
  console.log(saved?.id, saved?.cursor, saved?.key, saved?.body?.messages);
  return saved ? resumeChat(saved, options) : resumeChat("id", { ...options, after: "id.7" });
}

export function parse(text: string): ServerEvent[] {
  const events: ServerEvent[] = [];
  const feed = createParser({ onEvent: (event) => events.push(event) });
  createParser({ onEvent() {}, onId: (id) => id.trim(), onRetry: (ms) => ms.toFixed() }, 1 << 20)(text);
  feed(text);
  return events.map(({ type, data, id }) => ({ type, data, id }));
}

function show(tool: Tool): void {
  console.log(tool.id, tool.name, tool.json, tool.input);
}

function count(usage: Usage, ended: boolean): void {
  console.log(usage.input_tokens + usage.output_tokens, ended);
}
