// One hit beside the query, large, with what is known about it and why it was found.

import { call, original, thumbnail, withFiles } from "./api.js";
import { $, date, el, facts, fileName, number, size, warn } from "./dom.js";
import { scoreLine } from "./grid.js";
import { addParts, nameOf, pictureOf } from "./query.js";
import { go, requestParts } from "./state.js";

const LARGE_PX = 1024;
const LEAST_RANGE = 0.2; // of heat, from dark to bright: where all parts are alike, all are bright
const SHADE = 0.78;

let items = [];
let at = 0;
let query = null;
let canExplain = false;
let running = new AbortController();

export function startDetail() {
  const dialog = $("detail");
  $("previous").addEventListener("click", () => show(at - 1));
  $("next").addEventListener("click", () => show(at + 1));
  $("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("close", () => running.abort());
  dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(at + step);
  });
  const leave = (action) => () => {
    dialog.close();
    action(items[at].id);
  };
  $("like").addEventListener("click", leave((id) => go({ view: "search", parts: [{ id, weight: 1 }] })));
  $("plus").addEventListener("click", leave((id) => addParts([{ id, weight: 1 }])));
  $("minus").addEventListener("click", leave((id) => addParts([{ id, weight: -1 }])));
  $("why").addEventListener("click", () => {
    const wanted = $("why").getAttribute("aria-pressed") !== "true";
    $("why").setAttribute("aria-pressed", String(wanted));
    explain();
  });
}

export function allowWhy(patches) {
  canExplain = patches;
}

// `part`, if any, is shown beside them: a picture of the query, or what they are copies of.
export function openDetail(given, first, part = null, caption = "Query") {
  items = given;
  query = part;
  $("pair").classList.toggle("alone", !query);
  $("pair-query").hidden = !query;
  if (query) {
    $("query-picture").src = pictureOf(query, LARGE_PX);
    $("query-picture").alt = `${caption}: ${nameOf(query)}`;
    $("query-caption").textContent = caption;
  }
  $("why").hidden = !query || !canExplain;
  $("detail").showModal();
  show(first);
}

async function show(i) {
  if (i < 0 || i >= items.length) return;
  at = i;
  running.abort();
  running = new AbortController();
  const { signal } = running, item = items[at], name = fileName(item.path);
  $("detail-name").textContent = $("detail-name").title = name;
  $("previous").disabled = at === 0;
  $("next").disabled = at === items.length - 1;
  $("hit-picture").src = thumbnail(item.id, LARGE_PX);
  $("hit-picture").alt = name;
  $("hit-caption").replaceChildren(el("span", {}, `${number(at + 1)} of ${number(items.length)}`),
    ...(item.score === undefined ? [] : [scoreLine(item)]));
  $("original").href = original(item.id);
  facts($("facts"), [["Path", item.path]]);
  warn($("detail-error"), "");
  explain();
  try {
    const known = await call(`pictures/${item.id}`, { signal });
    const pixels = known.width_px && `${number(known.width_px)} × ${number(known.height_px)} pixels`;
    facts($("facts"), [[known.paths.length > 1 ? "Paths" : "Path", known.paths], ["Picture", pixels],
      ["Size", size(known.bytes)], ["Taken", known.taken && date(known.taken)], ["Camera", known.camera],
      ["Modified", date(known.modified)]]);
  } catch (error) {
    if (!signal.aborted) warn($("detail-error"), error.message);
  }
}

async function explain() {
  const { signal } = running;
  for (const canvas of $("pair").querySelectorAll("canvas")) canvas.width = canvas.height = 0;
  $("why-text").textContent = "";
  if ($("why").hidden || $("why").getAttribute("aria-pressed") !== "true") return;
  const { parts: [{ weight, ...part }], files } = requestParts([query]);
  $("why-text").textContent = "Comparing the parts …";
  try {
    const [why] = await Promise.all([
      call("why", { ...withFiles({ query: part, hit: items[at].id }, files), signal }),
      ...["query-picture", "hit-picture"].map((name) => $(name).decode()),
    ]);
    if (signal.aborted) return;
    shade($("query-picture"), why.query);
    shade($("hit-picture"), why.hit);
    $("why-text").textContent = `Alike by parts: ${why.score.toFixed(3)}. Bright parts have one like them in the ` +
      "other picture; the encoder saw what the dashed line encloses.";
  } catch (error) {
    if (signal.aborted) return;
    $("why-text").textContent = "";
    warn($("detail-error"), error.message);
  }
}

// Darkens a picture where the heat is low, and where the encoder did not look.
function shade(picture, { box, heat }) {
  const canvas = picture.nextElementSibling, context = canvas.getContext("2d");
  canvas.width = picture.naturalWidth;
  canvas.height = picture.naturalHeight;
  const [x, y, width, height] = box.map((share, i) => share * (i % 2 ? canvas.height : canvas.width));
  context.fillStyle = `rgb(0 0 0 / ${SHADE})`;
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.clearRect(x, y, width, height);
  context.save();
  context.beginPath();
  context.rect(x, y, width, height);
  context.clip();
  context.imageSmoothingQuality = "high";
  context.drawImage(mask(heat), x, y, width, height);
  context.restore();
  context.setLineDash([8, 6]);
  context.lineWidth = 2;
  context.strokeStyle = "rgb(255 255 255 / .85)";
  context.strokeRect(x + 1, y + 1, width - 2, height - 2);
}

function mask(heat) {
  const values = heat.flat(), high = Math.max(...values), range = Math.max(high - Math.min(...values), LEAST_RANGE);
  const pixels = new ImageData(heat[0].length, heat.length);
  values.forEach((value, i) => { pixels.data[4 * i + 3] = 255 * SHADE * (high - value) / range; });
  const canvas = el("canvas", { width: pixels.width, height: pixels.height });
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  return canvas;
}
