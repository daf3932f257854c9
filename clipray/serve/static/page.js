// What all pages do: keys, images that cannot be shown, parts that are loaded when they are opened, and grids that go on.

const TYPING = "input, select, textarea, [contenteditable]";

document.documentElement.classList.add("scripted");
document.addEventListener("keydown", onKey);
document.addEventListener("error", onBrokenImage, true);
document.addEventListener("toggle", (event) => event.target.matches?.("details.lazy[open]") && loadPart(event.target), true);
document.querySelectorAll("img").forEach((image) => {
  if (image.complete && image.naturalWidth === 0 && image.src) showReason(image);
});
continueGrid();

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest(TYPING)) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const tile = document.activeElement?.closest(".tile");
  const actions = {
    "/": () => focusWords(),
    Escape: () => (tile ? document.activeElement.blur() : history.back()),
    ArrowRight: () => moveBy(tile, 1),
    ArrowLeft: () => moveBy(tile, -1),
    ArrowDown: () => moveDown(tile, 1),
    ArrowUp: () => moveDown(tile, -1),
    m: () => tile?.querySelector(".more")?.click(),
    l: () => tile?.querySelector(".less")?.click(),
  };
  const action = actions[event.key];
  if (action && action() !== false) event.preventDefault();
}

function focusWords() {
  const words = document.getElementById("words");
  if (!words) return false;
  words.focus();
  words.select();
}

function focusTile(tile) {
  if (!tile) return false;
  tile.querySelector(".view").focus();
  tile.scrollIntoView({ block: "nearest" });
}

function moveBy(tile, step) {
  const tiles = [...document.querySelectorAll(".tile")];
  return focusTile(tile ? tiles[tiles.indexOf(tile) + step] : tiles[0]);
}

// The tile of the next row of the grid whose middle is nearest to this one's.
function moveDown(tile, step) {
  if (!tile) return step > 0 ? focusTile(document.querySelector(".tile")) : false;
  const tiles = [...document.querySelectorAll(".tile")];
  const from = tile.getBoundingClientRect();
  const middle = from.left + from.width / 2;
  const beyond = tiles
    .map((other) => [other, other.getBoundingClientRect()])
    .filter(([, box]) => (step > 0 ? box.top >= from.bottom - 1 : box.bottom <= from.top + 1));
  if (!beyond.length) return false;
  const tops = beyond.map(([, box]) => box.top);
  const top = step > 0 ? Math.min(...tops) : Math.max(...tops);
  const row = beyond.filter(([, box]) => Math.abs(box.top - top) < 2);
  const away = ([, box]) => Math.abs(box.left + box.width / 2 - middle);
  return focusTile(row.reduce((best, other) => (away(other) < away(best) ? other : best))[0]);
}

function onBrokenImage(event) {
  if (event.target instanceof HTMLImageElement) showReason(event.target);
}

// Puts the server's reason in the place of an image.
async function showReason(image) {
  const reason = document.createElement("span");
  reason.className = "none";
  reason.textContent = "cannot be shown";
  image.replaceWith(reason);
  try {
    const answer = await fetch(image.src);
    const message = (await answer.json()).error ?? "";
    reason.textContent = message.split(": ").pop().replaceAll("_", " ") || reason.textContent;
  } catch {
    // The server is gone, or the bytes are none of an image: the first words stay.
  }
}

// Fills a box that is opened with the part of another page.
async function loadPart(box) {
  if (box.dataset.asked) return;
  box.dataset.asked = "yes";
  try {
    const answer = await fetch(box.dataset.from);
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const part = page.querySelector("#part") ?? page.querySelector(".error");
    if (part) box.querySelector(".inside").replaceChildren(part);
  } catch {
    // The link that stands there leads to the same.
  }
}

// Fetches the next rows of a grid when its end comes into view.
function continueGrid() {
  const results = document.getElementById("results");
  if (!results || !("IntersectionObserver" in window)) return;
  const observer = new IntersectionObserver(
    (entries) => entries.some((entry) => entry.isIntersecting) && onEnd(), { rootMargin: "600px" });
  watch();

  function watch() {
    const next = results.querySelector(".next a[rel=next]");
    if (next) observer.observe(next);
  }

  async function onEnd() {
    const next = results.querySelector(".next a[rel=next]");
    if (!next || next.dataset.busy) return;
    next.dataset.busy = "yes";
    observer.unobserve(next);
    try {
      const answer = await fetch(next.href);
      if (!answer.ok) throw new Error(answer.statusText);
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      const tiles = page.querySelectorAll("#results .tile");
      results.querySelector(".tiles").append(...tiles);
      const more = page.querySelector("#results .next");
      next.closest(".next").replaceWith(...(more ? [more] : []));
      document.getElementById("news").textContent = `${tiles.length} more rows`;
      watch();
    } catch {
      next.textContent = "More could not be loaded: try again";
    }
  }
}
