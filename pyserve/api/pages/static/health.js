// What the server is doing: while it starts its phases, then whether it is well.
import { $ } from "./dom.js";

// In their order; one with nothing to do is passed over.
const PHASES = {
  start: "Start",
  download: "Download the model",
  build: "Compile for this machine, once",
  load: "Load the weights",
};
const READY_MS = 5000;
const STARTING_MS = 500;

/** Ask again and again; `onReady` is told whether the server takes requests. */
export async function follow(onReady) {
  let health = { status: "no answer", reason: "The server does not answer." };
  try {
    health = await (await fetch("health", { cache: "no-store" })).json();
  } catch {
    // shown as it is
  }
  show(health);
  onReady(health.status === "ready");
  setTimeout(() => follow(onReady), health.status === "ready" ? READY_MS : STARTING_MS);
}

function show(health) {
  const isReady = health.status === "ready";
  const isStarting = health.status === "starting";
  $("status").textContent = health.status;
  $("trouble").textContent = health.reason ?? "";
  $("trouble").hidden = !health.reason;
  $("status").className = isReady ? "good" : isStarting ? "busy" : "bad";
  $("starting").hidden = !isStarting;
  document.title = isStarting ? `pyserve: ${health.phase}` : "pyserve";
  if (isStarting) showPhases(health);
}

function showPhases({ phase, progress, eta_s: etaS, ended }) {
  const order = Object.keys(PHASES);
  const before = Object.keys(ended).filter((name) => name !== phase);
  const after = order.slice(order.indexOf(phase) + 1).filter((name) => !(name in ended));
  const items = [...before, phase, ...after].map((name) => {
    const item = document.createElement("li");
    const note = name === phase ? percent(progress) : name in ended ? `: ${ended[name].toFixed(1)} s` : "";
    item.textContent = (PHASES[name] ?? name) + note;
    if (name === phase) item.setAttribute("aria-current", "step");
    else if (name in ended) item.className = "done";
    return item;
  });
  $("phases").replaceChildren(...items);
  if (progress === null) $("progress").removeAttribute("value");
  else $("progress").value = progress;
  $("eta").textContent = etaS === null ? "" : `About ${Math.ceil(etaS)} s to the end of this phase.`;
}

const percent = (progress) => (progress === null ? "" : `: ${Math.floor(progress * 100)} %`);
