// The page at /: what the server is doing; then how to call it, and a chat with it.
// Text from the server is only ever set as text, never as markup.
"use strict";

const $ = (id) => document.getElementById(id);
const base = new URL(".", location.href).href;
const conversation = [];
let wasReady = false;
let running = null; // of the answer that streams

async function follow() {
  let wait = 1000;
  try {
    const reply = await fetch("health", { cache: "no-store" });
    const health = await reply.json();
    show(health);
    if (health.status === "ready") wait = 5000;
  } catch {
    tell("no answer from the server", "bad");
  }
  setTimeout(follow, wait);
}

function tell(text, kind) {
  $("status").textContent = text;
  $("status").className = kind;
}

function show(health) {
  const isReady = health.status === "ready";
  const isStarting = health.status === "starting";
  tell(health.reason ? `${health.status}: ${health.reason}` : health.status,
    isReady ? "good" : isStarting ? "" : "bad");
  $("starting").hidden = !isStarting;
  if (isStarting) {
    $("phase").textContent = health.phase;
    $("eta").textContent = health.eta_s === null ? "" : `about ${Math.ceil(health.eta_s)} s left`;
    if (health.progress === null) $("progress").removeAttribute("value");
    else $("progress").value = health.progress;
    document.title = `pyserve: ${health.phase}`;
  }
  if (isReady && !wasReady) {
    wasReady = true;
    document.title = "pyserve";
    $("ready").hidden = false;
    findModel();
  }
}

function headers() {
  const key = $("key").value.trim();
  const given = { "Content-Type": "application/json" };
  if (key) given.Authorization = `Bearer ${key}`;
  return given;
}

// The model's name is told only to who has the key.
async function findModel() {
  let name = null;
  try {
    const reply = await fetch("v1/models", { headers: headers() });
    if (reply.status === 401) $("key-row").hidden = false;
    if (reply.ok) name = (await reply.json()).data[0].id;
  } catch {
    // follow() tells that the server is gone
  }
  $("base").textContent = `${base}v1`;
  $("model").textContent = name === null ? "" : `; the model is ${name}`;
  const body = { messages: [{ role: "user", content: "Hello!" }] };
  const key = $("key-row").hidden ? [] : ["  -H 'Authorization: Bearer YOUR_KEY' \\"];
  $("curl").textContent = [
    `curl ${base}v1/chat/completions \\`,
    "  -H 'Content-Type: application/json' \\",
    ...key,
    `  -d '${JSON.stringify(body)}'`,
  ].join("\n");
}

function add(kind, text) {
  const box = document.createElement("div");
  box.className = `message ${kind}`;
  box.textContent = text;
  $("chat").append(box);
  return box;
}

async function ask(text) {
  conversation.push({ role: "user", content: text });
  add("user", text);
  const box = add("assistant", "");
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  let answer = "";
  let failure = null;
  try {
    const body = { messages: conversation, stream: true, stream_options: { include_usage: true } };
    const began = performance.now();
    let first = null;
    for await (const frame of frames(body, running.signal)) {
      if (frame.error) throw new Error(frame.error.message);
      const delta = frame.choices[0]?.delta.content;
      if (delta) {
        first ??= performance.now();
        answer += delta;
        box.textContent = answer;
      }
      if (frame.usage) speed(frame.usage, (first ?? began) - began, performance.now() - began);
    }
  } catch (error) {
    if (error.name !== "AbortError") failure = error.message;
  }
  if (answer) conversation.push({ role: "assistant", content: answer });
  else {
    conversation.pop();
    box.remove();
  }
  if (failure !== null) add("error", failure);
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
}

async function* frames(body, signal) {
  const reply = await fetch("v1/chat/completions", {
    method: "POST", headers: headers(), body: JSON.stringify(body), signal,
  });
  if (reply.status === 401) $("key-row").hidden = false;
  if (!reply.ok) {
    yield await reply.json();
    return;
  }
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) yield JSON.parse(line.slice(6));
    }
  }
}

function speed(usage, firstMs, allMs) {
  const count = usage.completion_tokens;
  const rate = (count * 1000 / allMs).toFixed(0);
  $("speed").textContent =
    `${count} tokens, first after ${firstMs.toFixed(0)} ms, ${rate} tokens/s in all`;
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running) return;
  $("text").value = "";
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("clear").addEventListener("click", () => {
  running?.abort();
  conversation.length = 0;
  $("chat").replaceChildren();
  $("speed").textContent = "";
});
$("key").addEventListener("change", findModel);
follow();
