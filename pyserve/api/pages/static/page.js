// The page at /: the parts of it, put together.
import { get, hasKey, setKey, whenKeyIsWanted } from "./api.js";
import * as chat from "./chat.js";
import { $ } from "./dom.js";
import * as health from "./health.js";
import { makeCode } from "./markdown.js";
import * as plots from "./plots.js";
import * as settings from "./settings.js";
import * as sidebar from "./sidebar.js";
import * as store from "./store.js";

const base = new URL(".", location.href).href;
let isKnown = false; // the model, since the server was last ready

function showCall() {
  const request = { messages: [{ role: "user", content: "Hello!" }] };
  const wantsKey = hasKey() || !$("key-form").hidden;
  $("base").textContent = `${base}v1`;
  $("curl").replaceChildren(makeCode("bash", [
    `curl ${base}v1/chat/completions \\`,
    "  -H 'Content-Type: application/json' \\",
    ...(wantsKey ? ["  -H 'Authorization: Bearer YOUR_KEY' \\"] : []),
    `  -d '${JSON.stringify(request)}'`,
  ].join("\n")));
}

// The model's name is told only to who has the key.
async function findModel() {
  try {
    const models = (await (await get("v1/models")).json()).data;
    $("model").textContent = models[0].id;
    $("model").title = models[0].max_model_len ? `context of ${models[0].max_model_len} tokens` : "";
    $("key-form").hidden = true;
    return true;
  } catch (error) {
    return error.status === 401; // the key form asks for it
  } finally {
    showCall();
  }
}

async function onReady(isReady) {
  const wasKnown = isKnown;
  isKnown = isReady && (wasKnown || (await findModel()));
  chat.setReady(isReady);
  plots.setReady(isReady && $("key-form").hidden);
}

whenKeyIsWanted((message, wasGiven) => {
  $("key-form").hidden = false;
  $("metrics").hidden = true; // a link cannot carry the key
  $("key-error").hidden = !wasGiven;
  $("key-error").textContent = message;
  plots.setReady(false);
});
$("key-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  setKey($("key").value.trim(), $("keep-key").checked);
  await findModel();
  if ($("key-form").hidden) $("text").focus();
});

store.follow(chat.refresh, chat.isAnswering);
settings.start(sidebar.forgetAll);
sidebar.start();
chat.start(sidebar.show);
health.follow(onReady);
plots.follow();
