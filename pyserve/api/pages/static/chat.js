// The conversation that is shown: send, stop, edit, answer again. Answers to other conversations go
// on while another one is shown.
import { fill, makeAnswer, toRequest } from "./answer.js";
import { $ } from "./dom.js";
import { isSend, makeView } from "./messages.js";
import { toEnd } from "./scroll.js";
import { settings } from "./settings.js";
import * as store from "./store.js";

const SAVE_EVERY_MS = 1000;
const running = new Map(); // conversation -> AbortController of its answer
let views = new Map(); // message -> its view
let onList = () => {};
let isReady = false;
export let current = store.create();

/** Show `conversation`; `id` is in the address, so that a reload finds it again. */
export function open(conversation) {
  current = conversation;
  const isEmpty = conversation.messages.length === 0;
  history.replaceState(null, "", isEmpty ? location.pathname : `#${conversation.id}`);
  rebuild();
  toEnd();
  onList();
  if (matchMedia("(hover: hover)").matches) $("text").focus();
}

/** Another tab has changed or deleted a conversation. */
export function refresh(id) {
  if (id === current.id) open(store.find(id) ?? store.create());
  else onList();
}

/** Whether the server would answer now. */
export function setReady(value) {
  isReady = value;
  showState();
}

/** Stop what is running of a conversation. */
export function stop(conversation = current) {
  running.get(conversation)?.abort();
}

export const isAnswering = (conversation) => running.has(conversation);

// Messages only come and go at the end: the elements of those that stay are left alone, with what
// is selected or unfolded in them.
function rebuild() {
  const old = views;
  views = new Map(current.messages.map((message) =>
    [message, old.get(message) ?? makeView(message, { edit, again, goOn, answerTools })]));
  for (const [message, view] of old) if (!views.has(message)) view.element.remove();
  const last = current.messages.at(-1);
  for (const [message, view] of views) {
    if (!view.element.isConnected) $("messages").append(view.element);
    view.setLast?.(message === last);
  }
  showState();
}

function showState() {
  const isBusy = running.has(current);
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  $("send").disabled = !isReady;
  $("messages").hidden = current.messages.length === 0;
  $("empty").hidden = !isReady || current.messages.length > 0;
  $("messages").setAttribute("aria-busy", String(isBusy));
  $("messages").classList.toggle("busy", isBusy);
  $("earlier").hidden = isBusy || !current.earlier;
}

// `answer` is the last message: a new one, or one that goes on.
async function ask(answer, messages, fields) {
  const conversation = current;
  const controller = new AbortController();
  const beganMs = performance.now();
  let savedMs = beganMs;
  running.set(conversation, controller);
  keep(conversation);
  open(conversation);
  const show = () => {
    views.get(answer)?.update();
    if (conversation === current) showLive(answer, performance.now() - beganMs);
  };
  const clock = setInterval(show, 1000);
  await fill(answer, messages, fields, controller.signal, () => {
    show();
    if (performance.now() - savedMs < SAVE_EVERY_MS) return;
    savedMs = performance.now();
    keep(conversation);
  });
  clearInterval(clock);
  if (running.get(conversation) === controller) running.delete(conversation);
  keep(conversation);
  if (conversation === current) rebuild();
  onList();
}

function askAnew() {
  const messages = toRequest(current.messages, settings.system());
  const answer = makeAnswer();
  current.messages.push(answer);
  ask(answer, messages, settings.fields());
}

function goOn(answer) {
  if (running.has(current)) return;
  const messages = toRequest(current.messages, settings.system());
  answer.isPending = true;
  for (const name of ["finish", "error", "stats"]) delete answer[name];
  const fields = { continue_final_message: true, add_generation_prompt: false };
  ask(answer, messages, { ...settings.fields(), ...fields });
}

function keep(conversation) {
  if (store.find(conversation.id) === undefined && conversation.isDeleted) return;
  const isKept = store.save(conversation);
  $("hint").classList.toggle("unsaved", !isKept);
}

function showLive({ stats, isPending }, ms) {
  const rate = stats?.rate ? `, ${stats.rate.toFixed(0)} tokens/s` : "";
  const wait = ms < 1000 ? "" : `waiting ${Math.floor(ms / 1000)} s`;
  const text = stats ? `${stats.outputTokens} tokens${rate}` : wait;
  $("live").textContent = isPending ? text : "";
}

function send(text) {
  current.title ||= text.trim().slice(0, 80);
  current.messages.push({ role: "user", content: text });
  askAnew();
}

function edit(message, text) {
  cut(message);
  if (current.messages.length === 0) current.title = "";
  send(text);
}

function again(message) {
  cut(message);
  askAnew();
}

function answerTools(message, results) {
  if (running.has(current)) return;
  delete current.earlier;
  message.toolCalls.forEach((call, index) =>
    current.messages.push({ role: "tool", toolCallId: call.id, content: results[index] }));
  askAnew();
}

/** Take `message` and all after it away, for another version; this one can be had back. */
function cut(message) {
  stop();
  running.delete(current);
  const isFailure = message.error && !message.content && message === current.messages.at(-1);
  if (!isFailure) current.earlier = [...current.messages];
  current.messages.length = current.messages.indexOf(message);
}

function backToEarlier() {
  [current.messages, current.earlier] = [current.earlier, current.messages];
  keep(current);
  open(current);
}

/** Take the composer and its keys into use; `whenChanged` is called as conversations change. */
export function start(whenChanged) {
  onList = whenChanged;
  const text = $("text");
  const resize = () => {
    text.style.height = "auto";
    text.style.height = `${text.scrollHeight}px`;
  };
  text.addEventListener("input", resize);
  text.addEventListener("keydown", (event) => {
    if (!isSend(event)) return;
    event.preventDefault();
    $("composer").requestSubmit();
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    if (!text.value.trim() || running.has(current) || !isReady) return;
    const value = text.value;
    text.value = "";
    resize();
    delete current.earlier;
    send(value);
  });
  $("stop").addEventListener("click", () => stop());
  $("earlier").addEventListener("click", backToEarlier);
  addEventListener("keydown", (event) => {
    const isElsewhere = document.querySelector("dialog[open], [popover]:popover-open");
    if (event.key === "Escape" && !isElsewhere) stop();
  });
  open(store.find(location.hash.slice(1)) ?? current);
}
