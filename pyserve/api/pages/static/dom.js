// Small helpers over the page's elements and templates.

export const $ = (id) => document.getElementById(id);

/** A copy of the first element of a template. */
export function fromTemplate(id) {
  return $(id).content.firstElementChild.cloneNode(true);
}

/** The element of a copied template that is marked data-part="name". */
export function part(root, name) {
  return root.querySelector(`[data-part="${name}"]`);
}

/** A function that runs `action` soon, and for a fifth of the time at most, however often called. */
export function seldom(action) {
  let isQueued = false;
  let tookMs = 0;
  const run = () => {
    isQueued = false;
    const beganMs = performance.now();
    action();
    tookMs = performance.now() - beganMs;
  };
  return () => {
    if (isQueued) return;
    isQueued = true;
    setTimeout(() => requestAnimationFrame(run), 4 * tookMs);
  };
}

/** Copy `text`, and say so on `button` for a moment. */
export async function copy(text, button) {
  const isCopied = await writeClipboard(text);
  button.classList.add(isCopied ? "done" : "failed");
  const label = button.querySelector("svg") ? null : button.textContent;
  if (label !== null) button.textContent = isCopied ? "Copied" : "No access";
  setTimeout(() => {
    button.classList.remove("done", "failed");
    if (label !== null) button.textContent = label;
  }, 1200);
}

// Over plain HTTP from another machine a browser offers no navigator.clipboard.
async function writeClipboard(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const box = document.createElement("textarea");
    box.value = text;
    box.className = "offscreen";
    (document.querySelector("dialog[open]") ?? document.body).append(box);
    box.select();
    const isCopied = document.execCommand("copy");
    box.remove();
    return isCopied;
  }
}
