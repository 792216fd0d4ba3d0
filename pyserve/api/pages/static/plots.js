// Small plots of the server's load, from /metrics: asked for while somebody looks.
import { get } from "./api.js";
import { $ } from "./dom.js";

const EVERY_MS = 2000;
const NUM_POINTS = 60;
const NAMES = {
  tokens: "vllm:generation_tokens_total",
  running: "vllm:num_requests_running",
  waiting: "vllm:num_requests_waiting",
  kv: "vllm:kv_cache_usage_perc",
};
const series = { rate: [], running: [], waiting: [], kv: [] };
const count = (value) => Math.round(value).toLocaleString("en");
const UNITS = { rate: count, running: count, waiting: count, kv: (v) => `${(v * 100).toFixed(0)} %` };
let last = null; // tokens so far, and when
let isReady = false;

/** Ask only while the server takes requests. */
export function setReady(value) {
  isReady = value;
}

/** Ask again and again. */
export async function follow() {
  if (isReady && !document.hidden && $("side").checkVisibility()) {
    try {
      take(await (await get("metrics")).text());
    } catch {
      last = null; // without a key, or the server has gone: health.js tells
    }
  }
  setTimeout(follow, EVERY_MS);
}

function take(text) {
  const found = {};
  for (const [name, metric] of Object.entries(NAMES)) {
    // Lines "name{labels} value": the sum over their labels.
    const lines = text.split("\n").filter((line) => line.startsWith(`${metric}{`));
    found[name] = lines.reduce((sum, line) => sum + Number(line.slice(line.lastIndexOf(" "))), 0);
  }
  const now = performance.now();
  const rate = last === null ? 0 : (found.tokens - last.tokens) * 1000 / (now - last.now);
  last = { tokens: found.tokens, now };
  add("rate", Math.max(rate, 0));
  for (const name of ["running", "waiting", "kv"]) add(name, found[name]);
  $("load").hidden = false;
}

function add(name, value) {
  const values = series[name];
  values.push(value);
  if (values.length > NUM_POINTS) values.shift();
  const plot = document.querySelector(`[data-series="${name}"]`);
  plot.querySelector("output").textContent = UNITS[name](value);
  const top = name === "kv" ? 1 : Math.max(...values, 1);
  const step = 100 / (NUM_POINTS - 1);
  const start = NUM_POINTS - values.length;
  const points = values.map((v, i) => `${((start + i) * step).toFixed(1)},${(23 - 22 * v / top).toFixed(1)}`);
  plot.querySelector("polyline").setAttribute("points", points.join(" "));
}
