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
  const hash = conversation.messages.length ? `#${conversation.id}` : " ";
  history.replaceState(null, "", hash === " " ? location.pathname + location.search : hash);
  rebuild();
  toEnd();
  onList();
  if (matchMedia("(hover: hover)").matches) $("text").focus();
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

function rebuild() {
  const actions = { edit, again, answerTools };
  views = new Map(current.messages.map((message) => [message, makeView(message, actions)]));
  $("messages").replaceChildren(...[...views.values()].map((view) => view.element));
  const last = current.messages.at(-1);
  if (last?.toolCalls?.length && !last.isPending && !last.error) views.get(last).askForResults();
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
}

async function ask() {
  const conversation = current;
  const fields = settings.fields();
  const messages = toRequest(conversation.messages, settings.system());
  const answer = makeAnswer();
  const controller = new AbortController();
  conversation.messages.push(answer);
  running.set(conversation, controller);
  keep(conversation);
  open(conversation);
  let savedMs = performance.now();
  await fill(answer, messages, fields, controller.signal, () => {
    views.get(answer)?.update();
    if (conversation === current) showLive(answer);
    if (performance.now() - savedMs < SAVE_EVERY_MS) return;
    savedMs = performance.now();
    keep(conversation);
  });
  running.delete(conversation);
  keep(conversation);
  if (conversation === current) rebuild();
  onList();
}

function keep(conversation) {
  if (store.find(conversation.id) === undefined && conversation.isDeleted) return;
  const isKept = store.save(conversation);
  $("hint").classList.toggle("unsaved", !isKept);
}

function showLive({ stats, isPending }) {
  const rate = stats?.rate ? `, ${stats.rate.toFixed(0)} tokens/s` : "";
  $("live").textContent = isPending && stats ? `${stats.outputTokens} tokens${rate}` : "";
}

function send(text) {
  if (running.has(current) || !isReady) return;
  current.title ||= text.trim().slice(0, 80);
  current.messages.push({ role: "user", content: text });
  ask();
}

function edit(message, text) {
  cut(message);
  if (current.messages.length === 0) current.title = "";
  send(text);
}

function again(message) {
  if (!isReady) return;
  cut(message);
  ask();
}

function answerTools(message, results) {
  message.toolCalls.forEach((call, index) =>
    current.messages.push({ role: "tool", toolCallId: call.id, content: results[index] }));
  ask();
}

/** Take `message` and all after it away; what runs among them is stopped. */
function cut(message) {
  stop();
  running.delete(current);
  current.messages.length = current.messages.indexOf(message);
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
    send(value);
  });
  $("stop").addEventListener("click", () => stop());
  addEventListener("keydown", (event) => {
    const isElsewhere = document.querySelector("dialog[open], [popover]:popover-open");
    if (event.key === "Escape" && !isElsewhere) stop();
  });
  open(store.find(location.hash.slice(1)) ?? current);
}
