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

/** A kept value, null where there is none. */
export function read(name) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + name));
  } catch {
    return null; // of another version of this page, or the browser keeps nothing
  }
}

/** Keep a value; null forgets it. False where the browser has no room. */
export function keep(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
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

/** Keep `conversation`. False where not even it alone finds room. */
export function save(conversation) {
  conversation.updated = Date.now();
  conversations.set(conversation.id, conversation);
  const text = JSON.stringify(conversation);
  dropOldest(conversation.id, text.length);
  for (;;) {
    try {
      localStorage.setItem(CHAT + conversation.id, text);
      return true;
    } catch {
      const oldest = list().findLast((other) => other !== conversation);
      if (!oldest) return false;
      remove(oldest.id);
    }
  }
}

export function remove(id) {
  conversations.delete(id);
  try {
    localStorage.removeItem(CHAT + id);
  } catch {
    // nothing was kept
  }
}

function dropOldest(id, numChars) {
  let total = numChars;
  let count = 1;
  for (const other of list()) {
    if (other.id === id) continue;
    total += localStorage.getItem(CHAT + other.id)?.length ?? 0;
    count += 1;
    if (total > MAX_CHARS || count > MAX_CONVERSATIONS) remove(other.id);
  }
}

function load(name) {
  try {
    const found = JSON.parse(localStorage.getItem(name));
    if (!Array.isArray(found.messages)) return;
    for (const message of [...found.messages, ...(found.earlier ?? [])]) {
      if (!message.isPending) continue;
      delete message.isPending;
      message.error = "the page was closed before the answer was whole";
    }
    conversations.set(found.id, found);
  } catch {
    // of another version of this page
  }
}

/** Read all that is kept; then follow what other tabs change, calling `onChange`. */
export function follow(onChange) {
  try {
    for (const name of Object.keys(localStorage)) if (name.startsWith(CHAT)) load(name);
  } catch {
    // the browser keeps nothing
  }
  addEventListener("storage", ({ key, newValue }) => {
    if (!key?.startsWith(CHAT)) return;
    const id = key.slice(CHAT.length);
    if (newValue === null) conversations.delete(id);
    else if (!conversations.has(id)) load(key);
    onChange();
  });
}
