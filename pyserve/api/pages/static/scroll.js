// The messages scroll with their newest text, unless the reader has scrolled up.
import { $ } from "./dom.js";

const NEAR_PX = 48;
const box = $("scroll");
let isFollowing = true;
let lastTop = 0;

/** To the newest text, and stay there. */
export function toEnd() {
  isFollowing = true;
  follow();
}

function follow() {
  if (isFollowing) box.scrollTop = box.scrollHeight;
  lastTop = box.scrollTop;
  showJump();
}

const distance = () => box.scrollHeight - box.clientHeight - box.scrollTop;

function showJump() {
  $("jump").hidden = isFollowing || distance() < NEAR_PX;
}

box.addEventListener("scroll", () => {
  // Text that comes between two frames makes a distance too: only a move up is the reader's.
  if (distance() < NEAR_PX) isFollowing = true;
  else if (box.scrollTop < lastTop) isFollowing = false;
  lastTop = box.scrollTop;
  showJump();
}, { passive: true });

// What is opened by hand should stay under the hand.
box.addEventListener("click", (event) => {
  if (event.target.closest("summary")) isFollowing = false;
});

// Where a keyboard on the screen lies over the page instead of making it smaller, as on iOS.
visualViewport?.addEventListener("resize", () => {
  if (visualViewport.scale !== 1) return; // zoomed by hand
  const isCovered = visualViewport.height < innerHeight - 1;
  document.body.style.height = isCovered ? `${visualViewport.height}px` : "";
  if (isCovered) scrollTo(0, 0);
});

const observer = new ResizeObserver(follow);
observer.observe(box);
observer.observe($("messages"));
$("jump").addEventListener("click", toEnd);
