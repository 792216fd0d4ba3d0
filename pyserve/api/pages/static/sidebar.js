// The list of conversations.
import * as chat from "./chat.js";
import { $, fromTemplate, part } from "./dom.js";
import * as store from "./store.js";

function hide() {
  if ($("side").matches(":popover-open")) $("side").hidePopover();
}

function entry(conversation) {
  const row = fromTemplate("conversation-link");
  const title = conversation.title || "Untitled";
  part(row, "open").textContent = title;
  part(row, "open").title = title;
  part(row, "delete").setAttribute("aria-label", `Delete ${title}`);
  row.classList.toggle("answering", chat.isAnswering(conversation));
  if (conversation === chat.current) part(row, "open").setAttribute("aria-current", "true");
  part(row, "open").addEventListener("click", () => {
    chat.open(conversation);
    hide();
  });
  part(row, "delete").addEventListener("click", () => {
    if (confirm(`Delete "${title}"?`)) forget(conversation);
  });
  return row;
}

function forget(...conversations) {
  for (const conversation of conversations) {
    conversation.isDeleted = true;
    chat.stop(conversation);
    store.remove(conversation.id);
  }
  if (chat.current.isDeleted) chat.open(store.create());
  else show();
}

/** Show what is kept. */
export function show() {
  $("conversations").replaceChildren(...store.list().map(entry));
}

export const forgetAll = () => forget(...store.list());

export function start() {
  $("new").addEventListener("click", () => {
    chat.open(store.create());
    hide();
  });
}
