// An answer's Markdown as elements. What a model says is not trusted: HTML in it is shown as text,
// and what the renderer makes passes a sanitiser that knows these tags and attributes only. Nothing
// that loads by itself (images, styles, frames) is among them.
import { showCode } from "./code.js";
import { copy, fromTemplate, part } from "./dom.js";

const { marked, DOMPurify } = window;
const ALLOWED = {
  ALLOWED_TAGS: ["a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6",
    "hr", "li", "ol", "p", "pre", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"],
  ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["align", "start"], // no addresses: not held against the line above
  RETURN_DOM_FRAGMENT: true,
};

const escape = (text) => text.replace(/[&<>"]/g, (char) => `&#${char.charCodeAt(0)};`);

// Formulas are shown as they are written: as Markdown they would lose backslashes and underscores.
// Between single dollars is one where something in it is none of a price: $a_1$, not $5 or $6.
const MATH = {
  inline: { begin: /\\[([]|\$/,
    whole: /^(?:\\\(.{1,999}?\\\)|\\\[.{1,999}?\\\]|\$\$.{1,999}?\$\$|\$(?=[^$\n]*[\\^_])[^\s$](?:[^$\n]{0,999}[^\s$])?\$(?!\w))/ },
  block: { begin: /\n(?:\\\[|\$\$)/, whole: /^(?:\\\[[^]{1,1999}?\\\]|\$\$[^]{1,1999}?\$\$)[ \t]*(?:\n|$)/ },
};

function math(level) {
  const { begin, whole } = MATH[level];
  const name = `${level}Math`;
  const wrap = level === "block" ? (html) => `<p class="raw">${html}</p>` : (html) => html;
  return {
    name,
    level,
    start: (text) => text.match(begin)?.index,
    tokenizer(text) {
      const raw = text.match(whole)?.[0];
      return raw && { type: name, raw, text: raw.trim() };
    },
    renderer: ({ text }) => wrap(`<code>${escape(text)}</code>`),
  };
}

marked.use({
  gfm: true,
  breaks: true,
  extensions: [math("inline"), math("block")],
  renderer: {
    html: ({ text, block }) => (block ? `<p class="raw">${escape(text.trim())}</p>` : escape(text)),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

/**
 * Show `text` in `box`. Its blocks (paragraphs, lists, code) that have not changed since the last
 * call stay as they are, so that a growing answer costs its last block and a selection survives.
 */
export function show(box, text) {
  let position = 0;
  for (const token of marked.lexer(text)) {
    if (token.type === "space") continue;
    const old = box.children[position];
    if (old?.source !== token.raw) {
      const block = render(token);
      if (old) old.replaceWith(block);
      else box.append(block);
    }
    position += 1;
  }
  while (box.children.length > position) box.lastElementChild.remove();
}

function render(token) {
  const block = document.createElement("div");
  block.source = token.raw;
  block.append(DOMPurify.sanitize(marked.parser([token]), ALLOWED));
  for (const link of block.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of block.querySelectorAll("table")) putInto(table, "table");
  for (const pre of block.querySelectorAll("pre")) addCopy(pre);
  return block;
}

function putInto(element, className) {
  const box = document.createElement("div");
  box.className = className;
  element.replaceWith(box);
  box.append(element);
}

function addCopy(pre) {
  const language = pre.querySelector("code")?.className.replace("language-", "");
  const box = makeCode(language || "text", pre.textContent.replace(/\n$/, ""));
  pre.replaceWith(box);
}

/** A block of code with its language and a button that copies it. */
export function makeCode(language, text) {
  const box = fromTemplate("code-block");
  part(box, "language").textContent = language;
  showCode(part(box, "code"), language, text);
  part(box, "copy").addEventListener("click", (event) => copy(text, event.currentTarget));
  return box;
}
