
"use strict";
(() => {
const started = performance.now();
const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);

// ------------------------------------------------------------------ data

function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
const places = new Uint16Array(bytes(data.places).buffer);
const folderOf = new Uint32Array(bytes(data.folderOf).buffer);
const dates = new Uint32Array(bytes(data.dates).buffer);
const taken = bytes(data.taken);
const thumbs = new Uint32Array(bytes(data.thumbs).buffer);
const sizes = bytes(data.sizes);
const N = data.names.length;
const OTHERS = 8;
const groupOf = new Uint8Array(N);
const x = new Float32Array(N), y = new Float32Array(N);
const thumbOf = new Map();
const copiesOf = new Map();
let low = [1, 1], high = [0, 0];
for (let i = 0; i < N; i++) {
  groupOf[i] = data.folders[folderOf[i]][2];
  x[i] = places[2 * i] / 65535;
  y[i] = places[2 * i + 1] / 65535;
  low = [Math.min(low[0], x[i]), Math.min(low[1], y[i])];
  high = [Math.max(high[0], x[i]), Math.max(high[1], y[i])];
}
thumbs.forEach((point, t) => thumbOf.set(point, t));
for (const [point, folder, name] of data.copies) {
  if (!copiesOf.has(point)) copiesOf.set(point, []);
  copiesOf.get(point).push(folderText(folder) + "/" + name);
}
// The plane has no up: on a tall screen the long side stands.
const turned = (high[0] - low[0] > high[1] - low[1]) !== (innerWidth > innerHeight);
const px = turned ? y : x, py = turned ? x : y;
if (turned) { low.reverse(); high.reverse(); }
// Nor exact distances: it may be stretched a little towards the shape of the screen.
const shape = (high[0] - low[0]) / (high[1] - low[1]), space = innerWidth > 560 ? (innerWidth - 360) / (innerHeight - 80)
  : (innerWidth - 68) / (innerHeight - 230);
if (Number.isFinite(shape) && shape > 0) {
  const by = Math.min(1.4, Math.max(1 / 1.4, space / shape));
  for (let i = 0; i < N; i++) px[i] *= by;
  low[0] *= by; high[0] *= by;
}

function folderText(folder) {
  const [root, below] = data.folders[folder];
  const top = data.roots[root];
  return below ? (top === "/" ? "" : top) + "/" + below : top;
}
function pathOf(point) { return folderText(folderOf[point]) + "/" + data.names[point]; }
function linkOf(point) {
  return data.links[point] ?? "file://" + pathOf(point).split("/").map(encodeURIComponent).join("/").replace("//", "/");
}
function dateText(point) {
  if (!dates[point]) return "";
  const text = new Date(dates[point] * 60000).toISOString().slice(0, 16).replace("T", " ");
  return (taken[point] ? "taken " : "changed ") + text;
}
function number(count) { return count.toLocaleString("en"); }

const sheets = data.sheets.map((sheet) => {
  const image = new Image();
  image.src = "data:image/jpeg;base64," + sheet;
  image.decode().then(draw, () => {});
  return image;
});
data.sheets = null;

// ------------------------------------------------------------------ state

const dotsCanvas = $("dots"), view = $("view");
const dots = dotsCanvas.getContext("2d", { willReadFrequently: true, alpha: false }), over = view.getContext("2d");
const shown = new Array(OTHERS + 1).fill(true);
let width = 0, height = 0, dpr = 1;
let fitted = 1, scale = 1, left = 0, top_ = 0; // screen = left + px * scale, in CSS pixels
let colours = [], page = "#fff", ink = "#000", mark = "#000";
let matches = null, matchCount = 0;
let active = -1, held = false;
let placed = []; // thumbnails on the screen: t, x, y, w, h
let queued = false, flight = null;

function readColours() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  colours = Array.from({ length: OTHERS + 1 }, (_, i) => get("--c" + i));
  page = get("--page"); ink = get("--ink"); mark = get("--mark");
}
function visible(i) { return shown[groupOf[i]]; }

// ------------------------------------------------------------------ where things are

// Most zoomed in, neighbouring steps of the stored positions are a thumbnail apart.
const MAX_SCALE = 65535 * 96;
function clampScale(value) { return Math.min(MAX_SCALE, Math.max(fitted * 0.4, value)); }

function room() {
  const panel = document.querySelector("header").getBoundingClientRect();
  return width > 560 ? { l: panel.right + 40, t: 40, r: width - 48, b: height - 40 }
    : { l: 34, t: panel.bottom + 30, r: width - 34, b: height - 60 };
}
function frame(a, b) { // the view in which the rectangle from a to b fills the room
  const r = room(), w = b[0] - a[0], h = b[1] - a[1];
  const s = Math.min(w > 0 ? (r.r - r.l) / w : Infinity, h > 0 ? (r.b - r.t) / h : Infinity);
  const to = Number.isFinite(s) ? s : Math.min(r.r - r.l, r.b - r.t);
  return { s: to, l: (r.l + r.r) / 2 - (a[0] + b[0]) / 2 * to, t: (r.t + r.b) / 2 - (a[1] + b[1]) / 2 * to };
}
function go(target, animate = true) {
  cancelAnimationFrame(flight);
  if (!animate || matchMedia("(prefers-reduced-motion: reduce)").matches) {
    scale = target.s; left = target.l; top_ = target.t;
    return draw();
  }
  const from = { s: scale, l: left, t: top_ }, begin = performance.now();
  const step = (now) => {
    const part = Math.min(1, Math.max(0, (now - begin) / 180)), eased = 1 - (1 - part) ** 3;
    scale = from.s * (target.s / from.s) ** eased;
    // What is fixed on the screen between both views stays so.
    const share = Math.abs(target.s - from.s) < 1e-9 * from.s ? eased : (scale - from.s) / (target.s - from.s);
    left = from.l + (target.l - from.l) * share;
    top_ = from.t + (target.t - from.t) * share;
    draw();
    if (part < 1) flight = requestAnimationFrame(step);
  };
  flight = requestAnimationFrame(step);
}
function zoomed(factor, cx, cy) {
  const s = clampScale(scale * factor), by = s / scale;
  return { s, l: cx - (cx - left) * by, t: cy - (cy - top_) * by };
}
function fit(animate = true) { const to = frame(low, high); fitted = to.s; go(to, animate); }

// ------------------------------------------------------------------ drawing

function draw() {
  if (queued) return;
  queued = true;
  requestAnimationFrame(() => { queued = false; paint(); });
}

function paint() {
  const begin = performance.now();
  paintDots();
  paintThumbs();
  paintActive();
  tellView();
  document.documentElement.dataset.frame = (performance.now() - begin).toFixed(1);
}

// Dots go straight into the pixels: a hundred thousand of them in some milliseconds. A stamp is a disc with soft edges:
// for each of its pixels where it lies and how much of it is covered.
function stamp(radius, strength) {
  const reach = Math.ceil(radius + 0.5), w = buffer.width, out = { reach, dx: [], dy: [], at: [], cover: [] };
  for (let dy = -reach; dy <= reach; dy++) for (let dx = -reach; dx <= reach; dx++) {
    const cover = strength * Math.min(1, radius + 0.5 - Math.hypot(dx, dy));
    if (cover <= 0.02) continue;
    out.dx.push(dx); out.dy.push(dy); out.at.push(dy * w + dx); out.cover.push(cover);
  }
  return out;
}
function rgb(colour) {
  const hex = colour.slice(1), long = hex.length === 3 ? [...hex].map((c) => c + c).join("") : hex;
  const value = parseInt(long.slice(0, 6), 16);
  return [value >> 16, (value >> 8) & 255, value & 255];
}

function word([r, g, b]) { return (255 << 24 | b << 16 | g << 8 | r) >>> 0; }

let buffer = null, words = null;
function paintDots() {
  const w = dotsCanvas.width, h = dotsCanvas.height;
  if (!buffer || buffer.width !== w || buffer.height !== h) {
    buffer = dots.createImageData(w, h);
    words = new Uint32Array(buffer.data.buffer);
  }
  const paper = rgb(page);
  words.fill(word(paper));
  const inView = [];
  const margin = 8;
  for (let i = 0; i < N; i++) {
    const sx = left + px[i] * scale, sy = top_ + py[i] * scale;
    if (sx > -margin && sy > -margin && sx < width + margin && sy < height + margin && visible(i)) inView.push(i);
  }
  const many = inView.length, base = many > 20000 ? 1 : many > 3000 ? 2 : many > 500 ? 2.8 : 4;
  const tints = colours.map(rgb);
  if (matches) {
    blend(inView.filter((i) => !matches[i]), stamp(base * dpr, 0.16), tints);
    blend(inView.filter((i) => matches[i]), stamp((base + 1.2) * dpr, 1), tints);
  } else {
    const disc = stamp(base * dpr, many > 20000 ? 0.7 : 0.9);
    blend(inView.filter((i) => groupOf[i] === OTHERS), disc, tints); // below those that have a colour
    blend(inView.filter((i) => groupOf[i] !== OTHERS), disc, tints);
  }
  dots.putImageData(buffer, 0, 0);
}
function blend(points, { reach, dx, dy, at, cover }, tints) {
  const w = buffer.width, h = buffer.height, pixels = buffer.data, full = tints.map(word), length = at.length;
  for (const i of points) {
    const x0 = Math.round((left + px[i] * scale) * dpr), y0 = Math.round((top_ + py[i] * scale) * dpr);
    const inside = x0 >= reach && y0 >= reach && x0 < w - reach && y0 < h - reach;
    const tint = tints[groupOf[i]], r = tint[0], g = tint[1], b = tint[2], solid = full[groupOf[i]], middle = y0 * w + x0;
    for (let k = 0; k < length; k++) {
      if (!inside && (x0 + dx[k] < 0 || y0 + dy[k] < 0 || x0 + dx[k] >= w || y0 + dy[k] >= h)) continue;
      const part = cover[k], one = middle + at[k];
      if (part >= 1) { words[one] = solid; continue; }
      const byte = 4 * one;
      pixels[byte] += (r - pixels[byte]) * part;
      pixels[byte + 1] += (g - pixels[byte + 1]) * part;
      pixels[byte + 2] += (b - pixels[byte + 2]) * part;
    }
  }
}

// Level of detail: thumbnails come coarse to fine, and each is shown where it covers none before it. What is chosen
// depends on the scale and not on where the view is, so nothing flickers while the map is moved.
let chosenFor = "", chosen = [];
function thumbSize() {
  const most = Math.min(data.cell, Math.max(48, Math.min(width, height) / 5));
  return Math.min(most, Math.max(40, 44 * Math.max(1, scale / fitted) ** 0.45));
}
function choose() {
  const size = thumbSize(), full = thumbs.length >= 0.9 * N;
  const apart = size * (full ? 1.1 : 1.1 + 0.9 / Math.max(1, scale / fitted));
  const key = `${scale} ${apart} ${shown} ${matchCount} ${matches ? $("query").value : ""}`;
  if (key === chosenFor) return;
  chosenFor = key;
  chosen = [];
  const cells = new Map();
  const order = matches ? [...thumbs.keys()].sort((a, b) => matches[thumbs[b]] - matches[thumbs[a]]) : thumbs.keys();
  for (const t of order) {
    const i = thumbs[t];
    if (!visible(i)) continue;
    const sx = px[i] * scale, sy = py[i] * scale, cx = Math.floor(sx / apart), cy = Math.floor(sy / apart);
    let free = true;
    for (let dy = -1; dy <= 1 && free; dy++) for (let dx = -1; dx <= 1 && free; dx++) {
      const other = cells.get((cx + dx) + "," + (cy + dy));
      free = !other || Math.abs(other[0] - sx) >= apart || Math.abs(other[1] - sy) >= apart;
    }
    if (free) { cells.set(cx + "," + cy, [sx, sy]); chosen.push(t); }
  }
}
function drawThumb(context, t, dx, dy, dw, dh) {
  const a_sheet = data.across * data.across, sheet = sheets[Math.floor(t / a_sheet)], at = t % a_sheet;
  if (!sheet.complete || !sheet.naturalWidth) return;
  const cell = data.cell, w = sizes[2 * t], h = sizes[2 * t + 1];
  context.drawImage(sheet, (at % data.across) * cell, Math.floor(at / data.across) * cell, w, h, dx, dy, dw, dh);
}
function paintThumbs() {
  over.setTransform(dpr, 0, 0, dpr, 0, 0);
  over.clearRect(0, 0, width, height);
  over.imageSmoothingQuality = "high";
  choose();
  placed = [];
  const size = thumbSize();
  for (const t of chosen) {
    const i = thumbs[t], sx = left + px[i] * scale, sy = top_ + py[i] * scale;
    if (sx < -size || sy < -size || sx > width + size || sy > height + size) continue;
    const w = sizes[2 * t], h = sizes[2 * t + 1], by = size / Math.max(w, h);
    placed.push({ t, i, x: sx - w * by / 2, y: sy - h * by / 2, w: w * by, h: h * by });
  }
  for (const one of placed) {
    if (matches && !matches[one.i]) {
      frameOf(one, 2, page); // no dot shines through
      over.globalAlpha = 0.14;
    }
    frameOf(one, 2, colours[groupOf[one.i]]);
    drawThumb(over, one.t, one.x, one.y, one.w, one.h);
    over.globalAlpha = 1;
  }
}
function frameOf(one, line, colour) {
  over.fillStyle = colour;
  over.beginPath();
  over.roundRect(one.x - line, one.y - line, one.w + 2 * line, one.h + 2 * line, line + 1);
  over.fill();
}
function paintActive() {
  if (active < 0 || !visible(active)) return;
  const one = placed.find((other) => other.i === active);
  if (one) {
    frameOf(one, 4, ink);
    drawThumb(over, one.t, one.x, one.y, one.w, one.h);
  } else {
    const sx = left + px[active] * scale, sy = top_ + py[active] * scale;
    over.beginPath();
    over.arc(sx, sy, 6, 0, 7);
    over.fillStyle = colours[groupOf[active]];
    over.fill();
    over.lineWidth = 2.5;
    over.strokeStyle = ink;
    over.stroke();
  }
}

// ------------------------------------------------------------------ what is in view, as text

let telling = 0;
function tellView() {
  clearTimeout(telling);
  telling = setTimeout(() => {
    const all = [];
    for (let i = 0; i < N; i++) {
      const sx = left + px[i] * scale, sy = top_ + py[i] * scale;
      if (sx >= 0 && sy >= 0 && sx <= width && sy <= height && visible(i) && (!matches || matches[i])) all.push(i);
    }
    const text = `${number(all.length)} in view`;
    if ($("status").textContent !== text) $("status").textContent = text;
    const nearness = (i) => Math.hypot(left + px[i] * scale - width / 2, top_ + py[i] * scale - height / 2);
    if (all.length <= 20000) all.sort((a, b) => nearness(a) - nearness(b));
    const kept = document.activeElement && $("list").contains(document.activeElement);
    if (!kept) $("list").replaceChildren(...all.slice(0, 50).map(entry));
  }, 250);
}
function entry(i) {
  const item = document.createElement("li"), link = document.createElement("a");
  link.textContent = data.names[i];
  link.title = folderText(folderOf[i]);
  link.href = linkOf(i);
  link.target = "_blank";
  link.rel = "noopener";
  link.dataset.point = i;
  for (const kind of ["focus", "mouseenter"]) link.addEventListener(kind, () => activate(i));
  for (const kind of ["blur", "mouseleave"]) link.addEventListener(kind, () => activate(-1));
  item.append(link);
  return item;
}

// ------------------------------------------------------------------ the card

function activate(point, hold = false) {
  if (point === active && hold === held) return;
  active = point;
  held = hold && point >= 0;
  $("card").classList.toggle("held", held);
  $("card").hidden = point < 0;
  if (point >= 0) fillCard(point);
  draw();
}
function fillCard(i) {
  const t = thumbOf.get(i), large = $("large");
  large.hidden = t === undefined;
  if (t !== undefined) {
    const w = sizes[2 * t], h = sizes[2 * t + 1], most = width > 560 ? 198 : 96, by = most / Math.max(w, h);
    large.width = Math.round(w * by * dpr);
    large.height = Math.round(h * by * dpr);
    large.style.width = w * by + "px";
    large.style.height = h * by + "px";
    const context = large.getContext("2d");
    context.imageSmoothingQuality = "high";
    drawThumb(context, t, 0, 0, large.width, large.height);
  }
  const copies = copiesOf.get(i) ?? [], problem = data.problems[i];
  $("name").textContent = data.names[i];
  $("folder").textContent = folderText(folderOf[i]);
  $("date").textContent = dateText(i);
  const without = thumbs.length ? `Not among the ${number(thumbs.length)} with a thumbnail` : "This map has no thumbnails";
  $("note").textContent = problem ? `No picture: ${problem}` : t === undefined ? without : "";
  const lines = copies.length ? [copies.length === 1 ? "1 copy" : `${number(copies.length)} copies`, ...copies.slice(0, 5)] : [];
  $("copies").replaceChildren(...lines.map((line) => {
    const item = document.createElement("li");
    item.textContent = line;
    return item;
  }));
  $("open").href = linkOf(i);
  placeCard(i);
}
function placeCard(i) {
  const card = $("card"), box = card.getBoundingClientRect(), sx = left + px[i] * scale, sy = top_ + py[i] * scale;
  const gap = thumbSize() / 2 + 12;
  const cx = sx + gap + box.width < width - 8 ? sx + gap : sx - gap - box.width;
  const cy = Math.min(Math.max(8, sy - box.height / 2), height - box.height - 8);
  card.style.transform = `translate(${Math.max(8, cx)}px, ${Math.max(8, cy)}px)`;
}
function pick(cx, cy) {
  for (let k = placed.length - 1; k >= 0; k--) {
    const one = placed[k];
    if (cx >= one.x - 2 && cy >= one.y - 2 && cx <= one.x + one.w + 2 && cy <= one.y + one.h + 2) {
      if (!matches || matches[one.i]) return one.i;
    }
  }
  let best = -1, nearest = 12 * 12;
  for (let i = 0; i < N; i++) {
    const dx = left + px[i] * scale - cx, dy = top_ + py[i] * scale - cy, far = dx * dx + dy * dy;
    if (far < nearest && visible(i) && (!matches || matches[i])) { nearest = far; best = i; }
  }
  return best;
}

// ------------------------------------------------------------------ pointer, wheel, keys

const pointers = new Map();
let moved = 0;
view.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  cancelAnimationFrame(flight);
  view.setPointerCapture(event.pointerId);
  pointers.set(event.pointerId, [event.clientX, event.clientY]);
  if (pointers.size === 1) moved = 0;
});
view.addEventListener("pointermove", (event) => {
  const before = pointers.get(event.pointerId), now = [event.clientX, event.clientY];
  if (!before) {
    if (event.pointerType !== "touch") hover(now);
    return;
  }
  moved += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]);
  if (pointers.size === 1) {
    if (moved > 4) {
      activate(-1);
      left += now[0] - before[0];
      top_ += now[1] - before[1];
      draw();
    }
  } else if (pointers.size === 2) {
    const [other] = [...pointers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    const far = (a) => Math.max(1, Math.hypot(a[0] - other[0], a[1] - other[1]));
    const middle = (a) => [(a[0] + other[0]) / 2, (a[1] + other[1]) / 2];
    const was = middle(before), is = middle(now);
    left += is[0] - was[0];
    top_ += is[1] - was[1];
    moved = 100;
    activate(-1);
    go(zoomed(far(now) / far(before), ...is), false);
  }
  pointers.set(event.pointerId, now);
});
function lift(event) {
  if (!pointers.delete(event.pointerId) || event.type === "pointercancel" || moved > 4) return;
  const point = pick(event.clientX, event.clientY);
  if (event.pointerType === "touch") activate(point, true); // the card has the link
  else if (point >= 0) open(linkOf(point), "_blank", "noopener");
}
view.addEventListener("pointerup", lift);
view.addEventListener("pointercancel", lift);
view.addEventListener("pointerleave", (event) => { if (event.pointerType !== "touch") activate(-1); });
function hover([cx, cy]) {
  const point = pick(cx, cy);
  view.classList.toggle("over", point >= 0);
  activate(point);
}
view.addEventListener("wheel", (event) => {
  event.preventDefault();
  const lines = event.deltaMode === 1 ? 16 : event.deltaMode === 2 ? 400 : 1;
  const by = Math.max(-240, Math.min(240, event.deltaY * lines));
  activate(-1);
  go(zoomed(Math.exp(-by * (event.ctrlKey ? 0.01 : 0.002)), event.clientX, event.clientY), false);
}, { passive: false });
function middle() { const r = room(); return [(r.l + r.r) / 2, (r.t + r.b) / 2]; }
const KEYS = {
  "+": () => go(zoomed(1.5, ...middle())), "=": () => go(zoomed(1.5, ...middle())),
  "-": () => go(zoomed(1 / 1.5, ...middle())), "−": () => go(zoomed(1 / 1.5, ...middle())), "_": () => KEYS["-"](),
  "0": () => fit(),
  ArrowLeft: () => go({ s: scale, l: left + 120, t: top_ }), ArrowRight: () => go({ s: scale, l: left - 120, t: top_ }),
  ArrowUp: () => go({ s: scale, l: left, t: top_ + 120 }), ArrowDown: () => go({ s: scale, l: left, t: top_ - 120 }),
  Escape: () => activate(-1),
  "/": () => $("query").focus(),
};
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
  const arrows = event.key.startsWith("Arrow");
  if (!KEYS[event.key] || (arrows && $("list").contains(event.target))) return;
  event.preventDefault();
  KEYS[event.key]();
});
$("in").addEventListener("click", KEYS["+"]);
$("out").addEventListener("click", KEYS["-"]);
$("fit").addEventListener("click", KEYS["0"]);

// ------------------------------------------------------------------ search

let lower = null;
function folded(text) { return text.normalize().toLowerCase(); } // macOS writes an é as two letters
function search() {
  const text = folded($("query").value);
  matches = null;
  matchCount = 0;
  if (text) {
    lower ??= data.folders.map((_, folder) => folded(folderText(folder)) + "/");
    matches = new Uint8Array(N);
    for (let i = 0; i < N; i++) {
      const hit = (lower[folderOf[i]] + folded(data.names[i])).includes(text)
        || copiesOf.get(i)?.some((copy) => folded(copy).includes(text));
      if (hit) { matches[i] = 1; matchCount++; }
    }
  }
  tellFound();
  activate(-1);
  draw();
}
function tellFound() {
  let seen = 0;
  if (matches) for (let i = 0; i < N; i++) if (matches[i] && visible(i)) seen++;
  $("found").textContent = !matches ? "" : seen ? `${number(seen)} found; Enter shows them`
    : matchCount ? `${number(matchCount)} found in hidden folders` : "Nothing found";
}
let typing = 0;
$("query").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(search, N > 5000 ? 120 : 0); });
$("query").addEventListener("keydown", (event) => {
  if (event.key === "Escape") { $("query").value = ""; search(); view.focus(); }
  if (event.key !== "Enter") return;
  clearTimeout(typing);
  search();
  if (!matchCount) return;
  const a = [1, 1], b = [0, 0];
  for (let i = 0; i < N; i++) if (matches[i] && visible(i)) {
    a[0] = Math.min(a[0], px[i]); a[1] = Math.min(a[1], py[i]);
    b[0] = Math.max(b[0], px[i]); b[1] = Math.max(b[1], py[i]);
  }
  if (a[0] > b[0]) return;
  const to = frame(a, b), s = Math.min(clampScale(to.s), fitted * 12), r = room();
  go({ s, l: (r.l + r.r) / 2 - (a[0] + b[0]) / 2 * s, t: (r.t + r.b) / 2 - (a[1] + b[1]) / 2 * s });
});

// ------------------------------------------------------------------ legend

data.groups.forEach((group, g) => {
  if (!group.count) return; // copies alone
  const button = document.createElement("button"), dot = document.createElement("i");
  const name = document.createElement("span"), count = document.createElement("span");
  button.type = "button";
  button.setAttribute("aria-pressed", "true");
  dot.style.setProperty("--dot", `var(--c${g})`);
  name.textContent = group.name;
  button.title = group.name;
  count.textContent = number(group.count);
  count.className = "count";
  button.append(dot, name, count);
  button.addEventListener("click", () => {
    shown[g] = !shown[g];
    button.setAttribute("aria-pressed", shown[g]);
    tellFound();
    activate(-1);
    draw();
  });
  $("groups").append(button);
});

// ------------------------------------------------------------------ start

function resize(first) {
  const was = [width, height];
  width = innerWidth;
  height = innerHeight;
  dpr = Math.min(2, devicePixelRatio || 1);
  for (const canvas of [dotsCanvas, view]) {
    canvas.width = Math.round(width * dpr);
    canvas.height = Math.round(height * dpr);
  }
  const whole = Math.abs(scale / fitted - 1) < 1e-6;
  if (first || whole) return fit(false);
  left += (width - was[0]) / 2;
  top_ += (height - was[1]) / 2;
  fitted = frame(low, high).s;
  draw();
}
if (innerWidth <= 560) $("legend").open = false;
readColours();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); draw(); });
addEventListener("resize", () => resize(false));
resize(true);
document.documentElement.dataset.points = N;
document.documentElement.dataset.ready = (performance.now() - started).toFixed(0);
})();
