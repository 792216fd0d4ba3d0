// How the page asks the server: the API key, errors in its words, and an answer frame by frame.
import { keep, keepInTab, read, readOfTab } from "./store.js";

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status; // 0: no answer at all
  }
}

let key = readOfTab("key") ?? read("key") ?? "";
const onKeyWanted = [];

export const hasKey = () => key !== "";

/** Call `action` whenever the server refuses a request for want of a key. */
export function whenKeyIsWanted(action) {
  onKeyWanted.push(action);
}

/** Use `value` from now on, in this tab or, where `isKept`, in this browser. */
export function setKey(value, isKept) {
  key = value;
  keepInTab("key", value && !isKept ? value : null);
  keep("key", value && isKept ? value : null);
}

/** The response to a GET of `path`. Raises ApiError for any but a success. */
export async function get(path) {
  return checked(await ask(path, { headers: headers() }));
}

/** The frames of a streamed chat completion, decoded, and the response's headers first. */
export async function* streamChat(body, signal) {
  const reply = await checked(await ask("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  }));
  yield { headers: reply.headers };
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, "the connection was closed before the answer was whole");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: [DONE]")) return;
      if (!line.startsWith("data: {")) continue;
      const frame = JSON.parse(line.slice(6));
      if (frame.error) throw new ApiError(frame.error.code ?? 500, frame.error.message);
      yield frame;
    }
  }
}

function headers() {
  const given = { "Content-Type": "application/json" };
  if (key) given.Authorization = `Bearer ${key}`;
  return given;
}

async function ask(path, options) {
  try {
    return await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "no answer from the server");
  }
}

async function checked(reply) {
  if (reply.ok) return reply;
  let message = `the server answered ${reply.status}`;
  try {
    message = (await reply.json()).error.message;
  } catch {
    // A proxy's own page: its status has to do.
  }
  const waitS = reply.headers.get("Retry-After");
  if (waitS) message += ` (try again in ${waitS} s)`;
  if (reply.status === 401) for (const action of onKeyWanted) action(message, hasKey());
  throw new ApiError(reply.status, message);
}
