// Colours for code: comments, texts, numbers and the words of a language, found by one pattern. It
// knows no grammar; what it takes wrongly has another colour, and never another text.

const MAX_CHARS = 100_000; // longer code stays as it is
const WORDS = {
  python: "and as assert async await break case class continue def del elif else except False finally for from global"
    + " if import in is lambda match None nonlocal not or pass raise return True try while with yield",
  script: "async await break case catch class const continue debugger default delete do else enum export extends"
    + " false finally for from function get if implements import in instanceof interface let new null of return"
    + " set static super switch this throw true try type typeof undefined var void while yield",
  braces: "abstract as async await auto bool break byte case catch char class const constexpr continue crate default"
    + " defer delete do double else enum export extends extern false final finally float fn for fun func go if impl"
    + " implements import in inline int interface let long loop match mod module mut namespace new nil null nullptr"
    + " object override package private protected pub public ref return self short signed sizeof static string struct"
    + " super switch template this throw throws trait true try type typedef typename union unsafe unsigned use using"
    + " val var virtual void volatile when where while yield",
  shell: "case do done elif else esac exit export fi for function if in local return set shift source then until while",
  sql: "add all alter and as asc begin between by case check commit constraint create cross default delete desc"
    + " distinct drop else end exists foreign from full group having if in index inner insert into is join key left"
    + " like limit not null offset on or order outer primary references returning right rollback select set table"
    + " then union unique update using values view when where with",
  data: "true false null yes no on off",
  ruby: "and begin break case class def do else elsif end ensure false for if in module next nil not or redo require"
    + " rescue retry return self super then true undef unless until when while yield",
};
const HASH = "#[^\\n]*";
const SLASHES = "//[^\\n]*|/\\*[^]*?(?:\\*/|$)";
const DOUBLE = '"(?:\\\\[^]|[^"\\\\\\n])*"?';
const SINGLE = "'(?:\\\\[^]|[^'\\\\\\n])*'?";
const CHARACTER = "'(?:\\\\[^'\\n]+|[^'\\\\\\n])'"; // an apostrophe alone is none: Rust's lifetimes
const LONG = '"""[^]*?(?:"""|$)|\'\'\'[^]*?(?:\'\'\'|$)';
const BACKTICKS = "`(?:\\\\[^]|[^`\\\\])*`?";
// Names of languages, their comments, texts and words.
const FAMILIES = [
  ["python py python3 starlark", HASH, `${LONG}|${DOUBLE}|${SINGLE}`, "python"],
  ["javascript js jsx mjs typescript ts tsx", SLASHES, `${DOUBLE}|${SINGLE}|${BACKTICKS}`, "script"],
  ["c h cpp c++ cc hpp cuda cu csharp cs java kotlin kt go rust rs swift scala dart zig php", SLASHES,
    `${DOUBLE}|${CHARACTER}|${BACKTICKS}`, "braces"],
  ["bash sh shell zsh console dockerfile makefile", "(?<![^\\s])#[^\\n]*", `${DOUBLE}|${SINGLE}`, "shell"],
  ["sql postgresql mysql sqlite plpgsql", "--[^\\n]*|/\\*[^]*?(?:\\*/|$)", `${DOUBLE}|${SINGLE}`, "sql"],
  ["json jsonc json5 yaml yml toml ini", `(?<![^\\s])${HASH}|(?<![^\\s])//[^\\n]*`, `${LONG}|${DOUBLE}|${SINGLE}`, "data"],
  ["ruby rb r julia perl elixir", HASH, `${DOUBLE}|${SINGLE}`, "ruby"],
];
const known = new Map(FAMILIES.flatMap(([names, comment, text, words]) => {
  const pattern = `(${comment})|(${text})|(\\b\\d[\\w.]*)|([A-Za-z_]\\w*)`;
  const family = { pattern: new RegExp(pattern, "g"), words: new Set(WORDS[words].split(" ")), isSql: words === "sql" };
  return names.split(" ").map((name) => [name, family]);
}));
const CLASSES = ["", "comment", "text", "number"];

/** Put `text` into `element`, coloured where `language` is known. */
export function showCode(element, language, text) {
  const family = known.get(language.toLowerCase());
  if (!family || text.length > MAX_CHARS) {
    element.textContent = text;
    return;
  }
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(family.pattern)) {
    const kind = kindOf(match, family);
    if (!kind) continue;
    parts.push(text.slice(end, match.index), span(kind, match[0]));
    end = match.index + match[0].length;
  }
  element.replaceChildren(...parts, text.slice(end));
}

function kindOf(match, { words, isSql }) {
  if (match[4] === undefined) return CLASSES[match.findIndex((group, index) => index > 0 && group !== undefined)];
  return words.has(isSql ? match[4].toLowerCase() : match[4]) ? "word" : "";
}

function span(kind, text) {
  const element = document.createElement("span");
  element.className = `code-${kind}`;
  element.textContent = text;
  return element;
}
