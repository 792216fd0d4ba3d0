// What stays in this browser: conversations, settings, and the key where the user wants it kept.
//
// Each conversation is an item of its own, so that two tabs do not overwrite each other's. A
// browser gives 5 million characters to all pages of one address; the oldest conversations go
// when these take more than MAX_CHARS or are more than MAX_CONVERSATIONS.

const MAX_CHARS = 4_000_000;
const MAX_CONVERSATIONS = 100;
// Several servers may stand behind one address, each under a path of its own.
const PREFIX = `pyserve:${new URL(".", location.href).pathname}:`;
const CHAT = `${PREFIX}chat:`;
const conversations = new Map();
const storage = available("localStorage");
const tabStorage = available("sessionStorage");

// A browser that keeps nothing raises at the mention of it.
function available(name) {
  try {
    return window[name];
  } catch {
    return null;
  }
}

/** What this tab alone keeps, until it is closed; null where there is nothing. */
export function readOfTab(name) {
  return tabStorage?.getItem(PREFIX + name) ?? null;
}

/** Keep a text in this tab alone; null forgets it. */
export function keepInTab(name, text) {
  if (text === null) tabStorage?.removeItem(PREFIX + name);
  else tabStorage?.setItem(PREFIX + name, text);
}

/** A kept value, null where there is none. */
export function read(name) {
  try {
    return JSON.parse(storage?.getItem(PREFIX + name) ?? null);
  } catch {
    return null; // of another version of this page
  }
}

/** Keep a value; null forgets it. */
export function keep(name, value) {
  if (value === null) storage?.removeItem(PREFIX + name);
  else write(PREFIX + name, JSON.stringify(value));
}

function write(name, text) {
  try {
    storage.setItem(name, text);
    return true;
  } catch {
    return false; // no room, or a browser that keeps nothing
  }
}

/** All conversations, newest first. */
export function list() {
  return [...conversations.values()].sort((a, b) => b.updated - a.updated);
}

/** A conversation by its id; undefined where it is gone. */
export function find(id) {
  return conversations.get(id);
}

/** An empty conversation; it is kept once it is saved. */
export function create() {
  // crypto.randomUUID is missing over plain HTTP.
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2, 10);
  return { id, title: "", updated: Date.now(), messages: [] };
}

/** Keep `conversation`, at the expense of the oldest others. False where there is no room for it. */
export function save(conversation) {
  conversation.updated = Date.now();
  conversations.set(conversation.id, conversation);
  const text = JSON.stringify(conversation);
  if (storage === null || text.length > MAX_CHARS) return false;
  const others = list().filter((other) => other !== conversation);
  let numChars = text.length;
  others.forEach(({ id }, index) => {
    numChars += storage.getItem(CHAT + id)?.length ?? 0;
    if (numChars > MAX_CHARS || index + 2 > MAX_CONVERSATIONS) remove(id);
  });
  while (!write(CHAT + conversation.id, text)) {
    const oldest = others.pop();
    if (!oldest) return false;
    remove(oldest.id);
  }
  return true;
}

export function remove(id) {
  conversations.delete(id);
  storage?.removeItem(CHAT + id);
}

// `isFirst`: the page has just been opened, so that no answer is on its way any more.
function load(name, isFirst) {
  try {
    const found = JSON.parse(storage.getItem(name));
    if (!Array.isArray(found.messages)) return;
    for (const message of [...found.messages, ...(found.earlier ?? [])]) {
      if (!message.isPending || !isFirst) continue;
      delete message.isPending;
      message.error = "the page was closed before the answer was whole";
    }
    conversations.set(found.id, found);
  } catch {
    // of another version of this page
  }
}

/**
 * Read all that is kept; then follow what other tabs do to it, calling `onChange` with a
 * conversation's id. One that `isBusy` here stays as it is here.
 */
export function follow(onChange, isBusy) {
  for (const name of Object.keys(storage ?? {})) if (name.startsWith(CHAT)) load(name, true);
  addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(CHAT)) return;
    const id = key.slice(CHAT.length);
    if (isBusy(conversations.get(id))) return;
    if (newValue === null) conversations.delete(id);
    else load(key, false);
    onChange(id);
  });
}
