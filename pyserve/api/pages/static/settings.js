// System prompt and sampling: what every request of this browser carries. An empty field is not sent.
import { hasKey, setKey } from "./api.js";
import { $ } from "./dom.js";
import { keep, read } from "./store.js";

const dialog = $("settings");
const form = dialog.querySelector("form");
const names = [...form.elements].filter((field) => field.name).map((field) => field.name);
let values = read("settings") ?? {};

export const settings = {
  system: () => values.system?.trim() ?? "",

  /** The fields of a request. */
  fields() {
    const fields = {};
    for (const name of names) {
      const value = values[name]?.trim();
      if (value && form.elements[name].type === "number") fields[name] = Number(value);
    }
    const stop = (values.stop ?? "").split("\n").filter((line) => line !== "");
    if (stop.length) fields.stop = stop;
    if (values.tools?.trim()) fields.tools = JSON.parse(values.tools);
    if (values.extra?.trim()) Object.assign(fields, JSON.parse(values.extra));
    return fields;
  },
};

function check(name, isRight, wanted) {
  const field = form.elements[name];
  let isValid = true;
  try {
    isValid = !field.value.trim() || isRight(JSON.parse(field.value));
  } catch {
    isValid = false;
  }
  field.setCustomValidity(isValid ? "" : wanted);
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function showValues() {
  document.documentElement.dataset.theme = values.theme ?? "";
  const isSet = names.some((name) => name !== "theme" && values[name]?.trim());
  $("open-settings").classList.toggle("set", isSet);
  $("open-settings").title = isSet ? "Settings (some are set)" : "Settings";
}

/** Take the dialog into use; `forgetAll` deletes all conversations. */
export function start(forgetAll) {
  showValues();
  $("open-settings").addEventListener("click", () => {
    for (const name of names) form.elements[name].value = values[name] ?? "";
    $("forget-key").hidden = !hasKey();
    dialog.showModal();
  });
  form.addEventListener("input", () => {
    check("tools", Array.isArray, "This is not a JSON list.");
    check("extra", isObject, "This is not a JSON object.");
  });
  form.addEventListener("submit", (event) => {
    if (event.submitter?.value !== "save") return;
    values = Object.fromEntries(names.map((name) => [name, form.elements[name].value]));
    keep("settings", values);
    showValues();
  });
  $("forget").addEventListener("click", () => {
    if (confirm("Delete all conversations of this browser?")) forgetAll();
  });
  $("forget-key").addEventListener("click", (event) => {
    setKey("", false);
    event.currentTarget.hidden = true;
  });
}
