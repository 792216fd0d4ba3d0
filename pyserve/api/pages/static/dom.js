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

/** A function that runs `action` at most once a frame, however often it is called. */
export function onceAFrame(action) {
  let isQueued = false;
  return () => {
    if (isQueued) return;
    isQueued = true;
    requestAnimationFrame(() => {
      isQueued = false;
      action();
    });
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
