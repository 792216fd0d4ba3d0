// One view for each kind of message: what it looks like, from the message alone.
import { copy, fromTemplate, seldom, part } from "./dom.js";
import { show } from "./markdown.js";

const THINKING = /^\s*<think>([^]*?)(?:<\/think>\s*|$)/; // of a server without a reasoning parser

/** The view of `message`; `actions` are edit, again, goOn and answerTools, given the message. */
export function makeView(message, actions) {
  if (message.role === "user") return new UserView(message, actions);
  if (message.role === "tool") return new ToolView(message);
  return new AssistantView(message, actions);
}

class UserView {
  constructor(message, actions) {
    this.element = fromTemplate("user-message");
    const content = part(this.element, "content");
    content.textContent = message.content;
    part(this.element, "copy").addEventListener("click", (event) =>
      copy(message.content, event.currentTarget));
    part(this.element, "edit").addEventListener("click", () => this.edit(message, actions));
  }

  edit(message, actions) {
    const editor = fromTemplate("editor");
    const text = part(editor, "text");
    text.value = message.content;
    editor.addEventListener("submit", (event) => {
      event.preventDefault();
      if (text.value.trim()) actions.edit(message, text.value);
    });
    text.addEventListener("keydown", (event) => {
      if (isSend(event)) editor.requestSubmit(event.preventDefault());
      if (event.key !== "Escape") return;
      event.stopPropagation();
      editor.replaceWith(...this.hidden);
    });
    part(editor, "cancel").addEventListener("click", () => editor.replaceWith(...this.hidden));
    this.hidden = [...this.element.children];
    this.element.replaceChildren(editor);
    text.style.height = `${text.scrollHeight + 2}px`;
    text.focus();
  }
}

class ToolView {
  constructor(message) {
    this.element = fromTemplate("tool-message");
    part(this.element, "content").textContent = message.content;
  }
}

class AssistantView {
  constructor(message, actions) {
    this.message = message;
    this.actions = actions;
    this.element = fromTemplate("assistant-message");
    this.update = seldom(() => this.render());
    this.copyButton = part(this.element, "copy"); // later a block of code in the answer has one, too
    this.copyButton.addEventListener("click", (event) =>
      copy(split(message).content, event.currentTarget));
    for (const [name, action] of [["again", "again"], ["retry", "again"], ["goOn", "goOn"]]) {
      part(this.element, name).addEventListener("click", () => actions[action](message));
    }
    this.render();
  }

  render() {
    const { message, element } = this;
    const { content, reasoning, isThinking } = split(message);
    const isWaiting = Boolean(message.isPending);
    const hasNothing = !content && !reasoning && message.toolCalls.length === 0;
    part(element, "thinking").hidden = !reasoning;
    part(element, "thinking-title").textContent = thinkingTitle(message, isThinking);
    if (!isWaiting && reasoning && !content && message.toolCalls.length === 0) {
      part(element, "thinking").open = true; // there is nothing else to read
    }
    show(part(element, "reasoning"), reasoning);
    show(part(element, "content"), content);
    this.renderTools();
    part(element, "waiting").hidden = !isWaiting || !hasNothing;
    part(element, "failure").hidden = !message.error;
    part(element, "failure-text").textContent = message.error ?? "";
    this.copyButton.hidden = !content;
    part(element, "again").hidden = Boolean(message.error); // there is "Try again" then
    part(element, "note-text").textContent = notesOn(message);
    part(element, "note").hidden = part(element, "note-text").textContent === "";
    part(element, "goOn").hidden = !canGoOn(message);
    part(element, "stats").textContent = measured(message.stats);
    part(element, "stats").title = promptOf(message.stats);
    element.classList.toggle("pending", isWaiting);
    element.setAttribute("aria-busy", String(isWaiting));
  }

  renderTools() {
    const { message } = this;
    const box = part(this.element, "tools");
    message.toolCalls.forEach((call, index) => {
      if (!box.children[index]) box.append(fromTemplate("tool-call"));
      part(box.children[index], "name").textContent = call.name;
      part(box.children[index], "arguments").textContent = pretty(call.arguments);
    });
  }

  /** Show what only the last message of a conversation has: its tools' results are asked for. */
  setLast(isLast) {
    const { toolCalls, isPending, error } = this.message;
    this.element.classList.toggle("last", isLast);
    const isAsking = isLast && toolCalls.length > 0 && !isPending && !error;
    if (isAsking && !this.form) this.askForResults();
    if (isAsking) return;
    this.form?.remove();
    this.form = null;
  }

  askForResults() {
    const form = fromTemplate("tool-results");
    const fields = this.message.toolCalls.map((call) => {
      const field = fromTemplate("tool-result");
      part(field, "label").textContent = `Result of ${call.name}`;
      form.append(field);
      return field.querySelector("textarea");
    });
    const button = document.createElement("button");
    button.textContent = fields.length > 1 ? "Send results" : "Send result";
    form.append(button);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.actions.answerTools(this.message, fields.map((field) => field.value));
    });
    part(this.element, "tools").after(form);
    this.form = form;
  }
}

/** Enter alone sends; with Shift, or while an input method composes, it does not. */
export function isSend(event) {
  const isComposing = event.isComposing || event.keyCode === 229; // the latter in Safari
  return event.key === "Enter" && !event.shiftKey && !isComposing;
}

/** Content and reasoning of an answer. */
export function split({ content, reasoning }) {
  const found = reasoning ? null : content.match(THINKING);
  if (!found) return { content, reasoning, isThinking: Boolean(reasoning) && !content };
  const rest = content.slice(found[0].length);
  return { content: rest, reasoning: found[1], isThinking: !found[0].includes("</think>") };
}

function thinkingTitle(message, isThinking) {
  if (isThinking && message.isPending) return "Thinking …";
  return message.thinkingMs === undefined ? "Thoughts" : `Thought for ${seconds(message.thinkingMs)}`;
}

function measured(stats) {
  if (!stats) return "";
  const digits = stats.rate < 10 ? 1 : 0;
  const rate = stats.rate ? `${stats.rate.toLocaleString("en", { maximumFractionDigits: digits })} tokens/s · ` : "";
  const first = stats.firstMs === null ? "" : ` · first in ${seconds(stats.firstMs)}`;
  const text = `${rate}${stats.outputTokens.toLocaleString("en")} tokens${first}`;
  return text.replace(/(?<!·) (?!·)/g, "\u00a0"); // a narrow screen breaks it between its parts
}

function promptOf(stats) {
  return stats ? `prompt: ${stats.promptTokens} tokens, ${stats.cachedTokens} of them cached` : "";
}

/** Whether the server can be asked to write on where an answer has ended. */
function canGoOn(message) {
  const isCut = message.finish === "length" || message.finish === "stopped" || message.error;
  return isCut && message.content !== "" && !message.isPending && split(message).reasoning === "";
}

function notesOn({ finish, ignored, clamped, error }) {
  const notes = [];
  if (finish === "length") notes.push("Cut off: the limit of tokens, or of the context, is reached.");
  if (finish === "stopped" && !error) notes.push("Stopped.");
  if (clamped) notes.push(`Cut to what fits: ${clamped}.`);
  if (ignored) notes.push(`Without effect here: ${ignored}.`);
  return notes.join(" ");
}

function seconds(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // not whole yet, or not JSON
  }
}
