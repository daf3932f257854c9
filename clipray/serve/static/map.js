// The map: colours and their legend, moving about, what is under the pointer, and the rows within a lasso.

import { GridIndex } from "./grid_index.js";
import { PointCanvas } from "./point_canvas.js";

const REACH = 12; // px within which a point is under the pointer
const ROWS = 48; // that are listed at once
const OTHER = 254, NONE = 255;
const COLOURS = [
  "#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#ff9da7", "#9c755f", "#6b8cff",
  "#2ca02c", "#d62782", "#17becf", "#bcbd22", "#8c564b", "#7f5fd0", "#e377c2", "#1b9e77", "#d95f02", "#a6761d",
];
const RAMP = ["#440154", "#3b528b", "#21918c", "#5ec962", "#fde725"];
const GREY = "#8a8a92", FAINT = "#b9b9c0";

const part = (id) => document.getElementById(id);
const box = part("map"), points = part("points"), line = part("line"), hover = part("hover");
let canvas, index, codes, lasso = [], chosen = [], listed = 0, isLasso = false, hovered = -1, waiting = 0;
const pointers = new Map();

start().catch((error) => {
  const message = document.createElement("p");
  message.className = "error";
  message.textContent = error.message;
  box.replaceChildren(message);
});

async function start() {
  canvas = new PointCanvas(points);
  const places = new Float32Array(await bytesOf(box.dataset.points));
  index = new GridIndex(places);
  canvas.setPlaces(places);
  canvas.fit(index.bounds);
  await colour();
  listen();
  box.dataset.ready = "yes";
}

async function bytesOf(address) {
  const answer = await fetch(address);
  if (!answer.ok) throw new Error((await answer.json()).error);
  return answer.arrayBuffer();
}

async function colour() {
  const column = encodeURIComponent(part("colour").value);
  const [bytes, legend] = await Promise.all([
    bytesOf(`${box.dataset.codes}&column=${column}`),
    fetch(`${box.dataset.legend}&column=${column}`).then((answer) => answer.json()),
  ]);
  codes = new Uint16Array(bytes);
  canvas.setColours(codes, paletteOf(legend));
  showLegend(legend);
}

function paletteOf(legend) {
  const palette = new Uint8Array(256 * 4).fill(255);
  const set = (code, rgb) => palette.set([...rgb, 255], 4 * code);
  if (legend.values) legend.values.forEach((_, code) => set(code, rgbOf(COLOURS[code % COLOURS.length])));
  else for (let code = 0; code < legend.shades; code++) set(code, shade(code / (legend.shades - 1)));
  set(OTHER, rgbOf(GREY));
  set(NONE, rgbOf(FAINT));
  return palette;
}

function rgbOf(hex) {
  return [1, 3, 5].map((start) => parseInt(hex.slice(start, start + 2), 16));
}

// A colour of the ramp; share: 0 to 1.
function shade(share) {
  const place = share * (RAMP.length - 1), step = Math.min(Math.floor(place), RAMP.length - 2);
  const [from, to] = [rgbOf(RAMP[step]), rgbOf(RAMP[step + 1])];
  return from.map((value, n) => Math.round(value + (to[n] - value) * (place - step)));
}

function showLegend(legend) {
  const entries = (legend.values ?? []).map(({ value, rows }, code) => entry(COLOURS[code % COLOURS.length], String(value), rows, code));
  if (legend.others > 0) entries.push(entry(GREY, `${legend.others} others`, legend.other_rows, OTHER));
  if (!legend.values) entries.push(ramp(legend));
  if (legend.none) entries.push(entry(FAINT, "none", legend.none, NONE));
  part("legend").replaceChildren(...entries);
}

// A value of the legend; a click on it lists its rows.
function entry(colourOf, name, rows, code) {
  const button = document.createElement("button"), dot = document.createElement("i"), label = document.createElement("span"), count = document.createElement("small");
  button.type = "button";
  dot.style.background = colourOf;
  label.textContent = name;
  label.className = "name";
  count.textContent = rows.toLocaleString("en");
  button.append(dot, label, count);
  button.addEventListener("click", () => {
    const numbers = [];
    codes.forEach((each, number) => each === code && numbers.push(number));
    choose(numbers);
  });
  return button;
}

function ramp(legend) {
  const figure = document.createElement("div"), band = document.createElement("i"), ends = document.createElement("span");
  figure.className = "ramp";
  band.style.background = `linear-gradient(90deg, ${RAMP.join(", ")})`;
  const shown = (value) => (typeof value === "number" ? Number(value.toPrecision(4)).toLocaleString("en") : String(value));
  ends.textContent = `${shown(legend.low)} to ${shown(legend.high)}`;
  figure.append(band, ends);
  return figure;
}

function listen() {
  part("colour").addEventListener("change", colour);
  part("lasso").addEventListener("click", () => setLasso(!isLasso));
  part("in-view").addEventListener("click", chooseView);
  part("closer").addEventListener("click", () => canvas.zoomBy(1.5));
  part("farther").addEventListener("click", () => canvas.zoomBy(1 / 1.5));
  part("fit").addEventListener("click", () => canvas.fit(index.bounds));
  part("clear").addEventListener("click", () => choose([]));
  part("more-rows").addEventListener("click", listMore);
  points.addEventListener("pointerdown", onDown);
  points.addEventListener("pointermove", onMove);
  for (const name of ["pointerup", "pointercancel"]) points.addEventListener(name, onUp);
  points.addEventListener("pointerleave", () => pointers.size || showHover(-1));
  points.addEventListener("wheel", onWheel, { passive: false });
  points.addEventListener("keydown", onKey);
  new ResizeObserver(() => canvas.draw()).observe(points);
  const observer = new IntersectionObserver((seen) => seen.some((each) => each.isIntersecting) && listMore());
  observer.observe(part("more-rows"));
}

function setLasso(on) {
  isLasso = on;
  part("lasso").setAttribute("aria-pressed", String(on));
  points.classList.toggle("drawing", on);
}

function placeOf(event) {
  const bounds = points.getBoundingClientRect();
  return [event.clientX - bounds.left, event.clientY - bounds.top];
}

function onDown(event) {
  points.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, { at: placeOf(event), from: placeOf(event) });
  showHover(-1);
  if (isLasso || event.shiftKey) lasso = [placeOf(event)];
}

function onMove(event) {
  const pointer = pointers.get(event.pointerId), at = placeOf(event);
  if (!pointer) return lookUnder(at);
  const others = [...pointers].filter(([id]) => id !== event.pointerId).map(([, each]) => each.at);
  if (lasso.length) {
    lasso.push(at);
    drawLasso();
  } else if (others.length) {
    pinch(pointer.at, at, others[0]);
  } else {
    canvas.moveBy(at[0] - pointer.at[0], at[1] - pointer.at[1]);
  }
  pointer.at = at;
}

// Two fingers: their distance zooms, the place between them moves the map.
function pinch(before, now, other) {
  const distance = ([x, y]) => Math.max(Math.hypot(x - other[0], y - other[1]), 1);
  canvas.moveBy((now[0] - before[0]) / 2, (now[1] - before[1]) / 2);
  canvas.zoomBy(distance(now) / distance(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
}

function onUp(event) {
  const pointer = pointers.get(event.pointerId);
  pointers.delete(event.pointerId);
  if (lasso.length) {
    if (lasso.length > 2) choose(index.within(lasso.map(([x, y]) => canvas.toMap(x, y))));
    lasso = [];
    drawLasso();
    setLasso(false);
  } else if (pointer && event.type === "pointerup" && Math.hypot(pointer.at[0] - pointer.from[0], pointer.at[1] - pointer.from[1]) < 4) {
    const number = numberAt(pointer.at);
    if (number >= 0) choose([number]);
  }
}

function onWheel(event) {
  event.preventDefault();
  canvas.zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), ...placeOf(event));
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = 60;
  const actions = {
    ArrowLeft: () => canvas.moveBy(step, 0),
    ArrowRight: () => canvas.moveBy(-step, 0),
    ArrowUp: () => canvas.moveBy(0, step),
    ArrowDown: () => canvas.moveBy(0, -step),
    "+": () => canvas.zoomBy(1.5),
    "=": () => canvas.zoomBy(1.5),
    "-": () => canvas.zoomBy(1 / 1.5),
    0: () => canvas.fit(index.bounds),
    l: () => setLasso(!isLasso),
    v: chooseView,
    Escape: () => choose([]),
  };
  if (!(event.key in actions)) return;
  actions[event.key]();
  event.preventDefault();
  event.stopPropagation();
}

function drawLasso() {
  const ratio = devicePixelRatio || 1, pen = line.getContext("2d");
  [line.width, line.height] = [line.clientWidth * ratio, line.clientHeight * ratio];
  if (!lasso.length) return;
  pen.scale(ratio, ratio);
  pen.strokeStyle = getComputedStyle(line).color;
  pen.lineWidth = 2;
  pen.setLineDash([6, 4]);
  pen.beginPath();
  lasso.forEach(([x, y]) => pen.lineTo(x, y));
  pen.closePath();
  pen.stroke();
}

function numberAt([x, y]) {
  return index.nearest(...canvas.toMap(x, y), REACH / canvas.scale, REACH / canvas.scale);
}

function lookUnder(at) {
  const number = numberAt(at);
  if (number === hovered) return;
  clearTimeout(waiting);
  showHover(-1);
  hovered = number;
  if (number >= 0) waiting = setTimeout(() => showHover(number, at), 60);
}

async function showHover(number, at) {
  hovered = number;
  hover.hidden = true;
  if (number < 0) return;
  const tiles = await tilesOf([number]).catch(() => []);
  if (hovered !== number || !tiles.length) return;
  const shown = tiles[0].querySelector("img, .text");
  shown.removeAttribute("loading");
  hover.replaceChildren(shown, tiles[0].querySelector(".under"));
  hover.hidden = false;
  const [x, y] = at;
  hover.style.left = `${Math.min(x + 14, box.clientWidth - hover.offsetWidth - 4)}px`;
  hover.style.top = `${y + 14 + hover.offsetHeight > box.clientHeight ? Math.max(y - hover.offsetHeight - 10, 4) : y + 14}px`;
}

function chooseView() {
  const { clientWidth, clientHeight } = points;
  choose(index.within([[0, 0], [clientWidth, 0], [clientWidth, clientHeight], [0, clientHeight]].map(([x, y]) => canvas.toMap(x, y))));
}

// Marks points, and lists their rows below the map.
function choose(numbers) {
  chosen = numbers;
  listed = 0;
  canvas.choose(numbers);
  part("picked").hidden = part("clear").hidden = !numbers.length;
  part("picked-title").textContent = `${numbers.length.toLocaleString("en")} ${numbers.length === 1 ? "row" : "rows"}`;
  part("picked").querySelector(".tiles").replaceChildren();
  part("more-rows").hidden = true;
  part("news").textContent = numbers.length ? part("picked-title").textContent : "";
  listMore();
}

async function listMore() {
  const numbers = chosen.slice(listed, listed + ROWS);
  if (!numbers.length) return;
  const of = chosen;
  listed += numbers.length;
  const tiles = await tilesOf(numbers).catch(() => []);
  if (of !== chosen) return; // others were chosen in the meantime
  part("picked").querySelector(".tiles").append(...tiles);
  part("more-rows").hidden = listed >= chosen.length;
}

// Tiles of these rows, as the server renders them.
async function tilesOf(numbers) {
  const address = new URL(box.dataset.rows, location.href);
  numbers.forEach((number) => address.searchParams.append("row", number));
  address.searchParams.set("column", part("colour").value);
  const answer = await fetch(address);
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  return [...page.querySelectorAll(".tile")];
}
