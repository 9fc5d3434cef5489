// The collection on a plane: all pictures as dots, drawn into pixels, and thumbnails where there is room for them.

import { call, thumbnail } from "./api.js";
import { $, count, fileName, say } from "./dom.js";

const PADDING_PX = 48;
const REACH_PX = 14;
const THUMB_PX = 56;
const MOST_IMAGES = 600;
const MOST_ZOOM = 400;
const STRETCH = 1.5;
const PER_CELL = 4;

const canvas = $("points"), context = canvas.getContext("2d");
const images = new Map();
const chosenAt = new Map();
let search = () => {};
let ids = [], x = [], y = [], starts = [0, 0], sorted = [], across = 1, spread = [1, 1];
let width = 0, height = 0, ratio = 1, frame = null, fitted = 1, scale = 1, left = 0, top = 0;
let chosen = [], placed = [], active = -1, drawing = 0, settling = 0, naming = 0;

export function startMap(whenChosen) {
  search = whenChosen;
  new ResizeObserver(resize).observe($("plane"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  startPointers();
  canvas.addEventListener("keydown", key);
  canvas.addEventListener("blur", () => activate(-1));
  for (const [id, by] of [["zoom-in", 1.6], ["zoom-out", 1 / 1.6]]) {
    $(id).addEventListener("click", () => zoom(by, width / 2, height / 2));
  }
  $("zoom-fit").addEventListener("click", fit);
}

export async function loadMap() {
  say("Loading the map …");
  const points = await call("map");
  ids = points.ids;
  const [lowX, highX] = range(points.x), [lowY, highY] = range(points.y);
  x = Float32Array.from(points.x, (value) => (value - lowX) / (highX - lowX || 1));
  y = Float32Array.from(points.y, (value) => (value - lowY) / (highY - lowY || 1));
  sortIntoCells();
  width = 0;
  resize();
  say(`${count(ids.length, "picture")} on the map (${points.method.toUpperCase()})`);
}

function range(values) {
  return values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);
}

// Points by cells of a lattice over the plane, so that the pointer finds its neighbours among few.
function sortIntoCells() {
  across = Math.max(1, Math.ceil(Math.sqrt(ids.length / PER_CELL)));
  starts = new Uint32Array(across * across + 1);
  for (let i = 0; i < ids.length; i++) starts[cellOf(x[i], y[i]) + 1]++;
  for (let cell = 0; cell < across * across; cell++) starts[cell + 1] += starts[cell];
  const next = starts.slice();
  sorted = new Uint32Array(ids.length);
  for (let i = 0; i < ids.length; i++) sorted[next[cellOf(x[i], y[i])]++] = i;
}

const lattice = (value) => Math.min(across - 1, Math.max(0, Math.floor(value * across)));
const cellOf = (px, py) => lattice(py) * across + lattice(px);
const screenX = (i) => left + x[i] * spread[0] * scale;
const screenY = (i) => top + y[i] * spread[1] * scale;

// ---- the view

function resize() {
  const { clientWidth, clientHeight } = $("plane");
  if (!clientWidth || (clientWidth === width && clientHeight === height)) return;
  [width, height] = [clientWidth, clientHeight];
  ratio = Math.min(2, devicePixelRatio || 1);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  frame = context.createImageData(canvas.width, canvas.height);
  fit();
}

function fit() {
  const free = [Math.max(1, width - 2 * PADDING_PX), Math.max(1, height - 2 * PADDING_PX)];
  spread = [Math.min(STRETCH, Math.max(1, free[0] / free[1])), Math.min(STRETCH, Math.max(1, free[1] / free[0]))];
  fitted = scale = Math.min(free[0] / spread[0], free[1] / spread[1]);
  left = (width - spread[0] * scale) / 2;
  top = (height - spread[1] * scale) / 2;
  chosenAt.clear();
  moved();
}

function zoom(by, cx, cy) {
  const to = Math.min(fitted * MOST_ZOOM, Math.max(fitted / 2, scale * by));
  left = cx - (cx - left) * to / scale;
  top = cy - (cy - top) * to / scale;
  scale = to;
  moved();
}

function pan(dx, dy) {
  left += dx;
  top += dy;
  moved();
}

// Dots follow at once; which thumbnails are shown is decided again when the view rests.
function moved() {
  draw();
  clearTimeout(settling);
  settling = setTimeout(() => {
    chosen = choose();
    draw();
  }, 90);
}

// ---- drawing

function draw() {
  drawing ||= requestAnimationFrame(() => {
    drawing = 0;
    if (!frame) return;
    drawDots();
    drawThumbs();
  });
}

function drawDots() {
  const words = new Uint32Array(frame.data.buffer), w = canvas.width, h = canvas.height;
  const radius = ratio * Math.min(4, Math.max(1, 60 / Math.sqrt(ids.length) + Math.log2(scale / fitted) * 0.4));
  const reach = Math.ceil(radius), colour = ink("--dot"), steps = [];
  for (let dy = -reach; dy <= reach; dy++) for (let dx = -reach; dx <= reach; dx++) {
    if (dx * dx + dy * dy <= radius * radius) steps.push(dy * w + dx);
  }
  words.fill(0);
  const sx = spread[0] * scale * ratio, sy = spread[1] * scale * ratio, ox = left * ratio, oy = top * ratio;
  for (let i = 0; i < ids.length; i++) {
    const px = Math.round(ox + x[i] * sx), py = Math.round(oy + y[i] * sy);
    if (px < reach || py < reach || px >= w - reach || py >= h - reach) continue;
    const middle = py * w + px;
    for (let k = 0; k < steps.length; k++) words[middle + steps[k]] = colour;
  }
  context.putImageData(frame, 0, 0);
}

function ink(name) {
  const [red, green, blue] = getComputedStyle(canvas).getPropertyValue(name).match(/[0-9a-f]{2}/gi)
    .map((part) => parseInt(part, 16));
  return (255 << 24 | blue << 16 | green << 8 | red) >>> 0;
}

// Thumbnails that cover none of those before them. It depends on the zoom alone, in steps, so that none flickers while
// the map is moved.
function choose() {
  const level = Math.floor(2 * Math.log2(scale / fitted)), at = fitted * 2 ** (level / 2);
  if (chosenAt.has(level)) return chosenAt.get(level);
  const apart = THUMB_PX * (1.15 + Math.min(1, ids.length / 2000) / Math.max(1, at / fitted));
  const taken = new Map(), found = [];
  for (let i = 0; i < ids.length; i++) {
    const px = x[i] * spread[0] * at, py = y[i] * spread[1] * at;
    const cx = Math.floor(px / apart), cy = Math.floor(py / apart);
    let free = true;
    for (let k = 0; k < 9 && free; k++) {
      const other = taken.get((cy + Math.floor(k / 3) - 1) * 65536 + cx + k % 3 - 1);
      free = other === undefined || Math.abs(x[other] * spread[0] * at - px) >= apart
        || Math.abs(y[other] * spread[1] * at - py) >= apart;
    }
    if (free) {
      taken.set(cy * 65536 + cx, i);
      found.push(i);
    }
  }
  chosenAt.set(level, found);
  return found;
}

function drawThumbs() {
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.imageSmoothingQuality = "high";
  placed = [];
  for (const i of chosen) {
    const cx = screenX(i), cy = screenY(i);
    if (cx < -THUMB_PX || cy < -THUMB_PX || cx > width + THUMB_PX || cy > height + THUMB_PX) continue;
    const image = imageOf(ids[i]);
    if (!image.complete || !image.naturalWidth) continue;
    const by = THUMB_PX / Math.max(image.naturalWidth, image.naturalHeight);
    const w = image.naturalWidth * by, h = image.naturalHeight * by;
    placed.push([i, cx - w / 2, cy - h / 2, w, h]);
    context.save();
    context.beginPath();
    context.roundRect(cx - w / 2, cy - h / 2, w, h, 4);
    context.clip();
    context.drawImage(image, cx - w / 2, cy - h / 2, w, h);
    context.restore();
  }
  if (active < 0) return;
  const dot = [active, screenX(active) - 6, screenY(active) - 6, 12, 12];
  const [, px, py, w, h] = placed.find(([i]) => i === active) ?? dot;
  context.strokeStyle = getComputedStyle(canvas).getPropertyValue("--mark");
  context.lineWidth = 3;
  context.beginPath();
  context.roundRect(px - 2, py - 2, w + 4, h + 4, 6);
  context.stroke();
}

function imageOf(id) {
  let image = images.get(id);
  if (image) images.delete(id); // to the end: the one unused for longest is dropped first
  else {
    image = new Image();
    image.onload = draw;
    image.src = thumbnail(id, 128);
  }
  images.set(id, image);
  if (images.size > MOST_IMAGES) images.delete(images.keys().next().value);
  return image;
}

// ---- one picture

function pick(cx, cy, reach = REACH_PX) {
  const over = placed.findLast(([, px, py, w, h]) => cx >= px && cy >= py && cx <= px + w && cy <= py + h);
  if (over) return over[0];
  const [px, py] = [(cx - left) / scale / spread[0], (cy - top) / scale / spread[1]];
  const [rx, ry] = [reach / scale / spread[0], reach / scale / spread[1]];
  let best = -1, nearest = reach * reach;
  for (let row = lattice(py - ry); row <= lattice(py + ry); row++) {
    for (let at = starts[row * across + lattice(px - rx)]; at < starts[row * across + lattice(px + rx) + 1]; at++) {
      const i = sorted[at], far = (screenX(i) - cx) ** 2 + (screenY(i) - cy) ** 2;
      if (far < nearest) [best, nearest] = [i, far];
    }
  }
  return best;
}

function activate(i) {
  if (i === active) return;
  active = i;
  draw();
  clearTimeout(naming);
  $("point").hidden = i < 0;
  if (i < 0) return;
  const id = ids[i], right = screenX(i) < width / 2, below = screenY(i) < height / 2;
  $("point-picture").src = thumbnail(id);
  $("point-name").textContent = "";
  $("point").style.setProperty("left", right ? `${Math.max(0, screenX(i) + 40)}px` : "auto");
  $("point").style.setProperty("right", right ? "auto" : `${Math.max(0, width - screenX(i) + 40)}px`);
  $("point").style.setProperty("top", below ? `${Math.max(8, screenY(i) - 30)}px` : "auto");
  $("point").style.setProperty("bottom", below ? "auto" : `${Math.max(8, height - screenY(i) - 30)}px`);
  naming = setTimeout(async () => {
    const { paths } = await call(`pictures/${id}`).catch(() => ({ paths: [] }));
    if (active !== i || !paths.length) return;
    $("point-name").textContent = fileName(paths[0]);
    if (document.activeElement === canvas) say(fileName(paths[0]));
  }, 200);
}

// ---- pointers and keys

function startPointers() {
  const down = new Map();
  let travelled = 0, before = -1;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    down.set(event.pointerId, place(event));
    travelled = down.size === 1 ? 0 : Infinity;
    before = active;
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = place(event), was = down.get(event.pointerId);
    if (!was) {
      activate(pick(...now));
      canvas.classList.toggle("over", active >= 0);
      return;
    }
    travelled += Math.hypot(now[0] - was[0], now[1] - was[1]);
    down.set(event.pointerId, now);
    if (travelled <= 4) return;
    activate(-1);
    if (down.size === 1) pan(now[0] - was[0], now[1] - was[1]);
    if (down.size !== 2) return;
    const other = [...down].find(([id]) => id !== event.pointerId)[1];
    const far = (place) => Math.max(1, Math.hypot(place[0] - other[0], place[1] - other[1]));
    pan((now[0] - was[0]) / 2, (now[1] - was[1]) / 2);
    zoom(far(now) / far(was), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  });
  const lift = (event) => {
    if (!down.delete(event.pointerId) || event.type === "pointercancel" || travelled > 4) return;
    const i = pick(...place(event));
    // A finger cannot hover: its first touch shows, its second searches.
    if (i >= 0 && (event.pointerType === "mouse" || i === before)) search(ids[i]);
    else activate(i);
  };
  canvas.addEventListener("pointerup", lift);
  canvas.addEventListener("pointercancel", lift);
  canvas.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") activate(-1); });
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    const lines = event.deltaMode ? 16 : 1, by = Math.max(-240, Math.min(240, event.deltaY * lines));
    activate(-1);
    zoom(Math.exp(-by * (event.ctrlKey ? 0.01 : 0.002)), ...place(event));
  }, { passive: false });
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = 80, [cx, cy] = [width / 2, height / 2];
  const moves = {
    ArrowLeft: () => pan(step, 0), ArrowRight: () => pan(-step, 0), ArrowUp: () => pan(0, step),
    ArrowDown: () => pan(0, -step), "+": () => zoom(1.6, cx, cy), "=": () => zoom(1.6, cx, cy),
    "-": () => zoom(1 / 1.6, cx, cy), "0": fit,
  };
  if (event.key === "Enter" && active >= 0) search(ids[active]);
  else if (event.key === "Escape") activate(-1);
  else if (moves[event.key]) {
    event.preventDefault();
    moves[event.key]();
    activate(-1);
    activate(pick(cx, cy, Math.max(width, height)));
  }
}
