// One answer: ask the server for it, and gather its stream into a message.
import { streamChat } from "./api.js";
import { split } from "./messages.js";

/** An answer that has not begun. */
export function makeAnswer() {
  return { role: "assistant", content: "", reasoning: "", toolCalls: [], isPending: true };
}

/**
 * Stream the answer to `messages` into `message`, calling `onChange` after each piece. Never
 * raises: what goes wrong, and what has come before it, is in the message.
 */
export async function fill(message, messages, fields, signal, onChange) {
  const clock = { beganMs: performance.now(), firstMs: null, lastMs: null };
  try {
    const body = {
      messages, ...fields, stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true },
    };
    for await (const frame of streamChat(body, signal)) {
      take(message, frame, clock);
      onChange();
    }
  } catch (error) {
    if (error.name === "AbortError") message.finish = "stopped";
    else message.error = error.message;
  }
  delete message.isPending;
  if (!message.content && !message.reasoning && message.toolCalls.length === 0) {
    if (message.finish === "stopped") message.error = "Stopped before the first word.";
    else message.error ??= "The answer is empty.";
  }
  onChange();
}

function take(message, frame, clock) {
  if (frame.headers) {
    for (const name of ["ignored", "clamped"]) {
      const value = frame.headers.get(`x-pyserve-${name}`);
      if (value) message[name] = value;
    }
    return;
  }
  const now = performance.now() - clock.beganMs;
  const choice = frame.choices?.find(({ index }) => index === 0); // others where n was asked for
  if (choice) {
    const delta = choice.delta ?? {};
    const reasoning = delta.reasoning_content ?? delta.reasoning ?? "";
    if (reasoning || delta.content || delta.tool_calls) {
      clock.firstMs ??= now;
      clock.lastMs = now;
    }
    const wasThinking = split(message).isThinking;
    message.reasoning += reasoning;
    message.content += delta.content ?? "";
    for (const piece of delta.tool_calls ?? []) takeToolCall(message.toolCalls, piece);
    const { isThinking } = split(message);
    if (isThinking || wasThinking) message.thinkingMs = now - clock.firstMs;
    if (choice.finish_reason) message.finish = choice.finish_reason;
  }
  if (frame.usage) message.stats = measure(frame.usage, clock);
}

function takeToolCall(calls, piece) {
  const index = piece.index ?? 0;
  while (calls.length <= index) calls.push({ id: "", name: "", arguments: "" });
  const call = calls[index];
  if (piece.id) call.id = piece.id;
  call.name += piece.function?.name ?? "";
  call.arguments += piece.function?.arguments ?? "";
}

function measure(usage, { firstMs, lastMs }) {
  const count = usage.completion_tokens ?? 0;
  const decodeMs = firstMs === null ? 0 : lastMs - firstMs;
  return {
    outputTokens: count,
    promptTokens: usage.prompt_tokens,
    cachedTokens: usage.prompt_tokens_details?.cached_tokens ?? 0,
    firstMs,
    rate: count > 1 && decodeMs > 5 ? (count - 1) * 1000 / decodeMs : null,
  };
}

/** The messages of a request: what a conversation has, without failed answers that said nothing. */
export function toRequest(messages, system) {
  const sent = system ? [{ role: "system", content: system }] : [];
  for (const message of messages) {
    if (message.role === "tool") {
      sent.push({ role: "tool", tool_call_id: message.toolCallId, content: message.content });
    } else if (message.role === "user") {
      sent.push({ role: "user", content: message.content });
    } else if (message.toolCalls.length > 0) {
      const calls = message.toolCalls.map(({ id, name, arguments: text }) =>
        ({ id, type: "function", function: { name, arguments: text } }));
      sent.push({ role: "assistant", content: split(message).content, tool_calls: calls });
    } else if (split(message).content) {
      sent.push({ role: "assistant", content: split(message).content });
    }
  }
  return sent;
}
