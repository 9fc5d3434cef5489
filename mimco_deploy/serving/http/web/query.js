// The query: pictures with + or −, a crop of each, and the filters. It only reads and changes the state.

import { thumbnail } from "./api.js";
import { CropBox } from "./crop.js";
import { $, el } from "./dom.js";
import { DRAGGED } from "./grid.js";
import { go, MAX_PARTS, state, upload, uploaded } from "./state.js";

const wide = matchMedia("(min-width: 900px)");
let active = 0;
let box;

export const pictureOf = (part, px) => uploaded(part)?.address ?? thumbnail(part.id, px);
export const nameOf = (part) => uploaded(part)?.file.name || "picture of the index";

export function addParts(parts, { anew = false } = {}) {
  if (!parts.length) return;
  const kept = anew ? [] : state.parts;
  const all = [...kept, ...parts].slice(0, MAX_PARTS);
  active = Math.min(kept.length, all.length - 1);
  go({ view: "search", parts: all });
}

export function startQuery() {
  box = new CropBox($("frame"), (crop) => {
    changePart(active, { crop: crop ?? undefined });
    if (!crop) $("crop").focus({ preventScroll: true });
  });
  $("choose").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => {
    addParts([...$("files").files].map((file) => upload(file)));
    $("files").value = "";
  });
  $("clear").addEventListener("click", () => {
    go({ parts: [] });
    $("choose").focus();
  });
  $("crop").addEventListener("click", () => {
    const crop = state.parts[active].crop ? null : [0.2, 0.2, 0.6, 0.6];
    changePart(active, { crop: crop ?? undefined });
    if (crop) $("crop-box").focus();
  });
  // The server reads formats that the browser cannot show.
  for (const kind of ["load", "error"]) $("shown").addEventListener(kind, () => {
    $("frame").hidden = $("crop").hidden = kind === "error";
    $("crop-text").textContent = kind === "error" ? `${$("shown").alt} (no preview)` : "or draw a box on it";
  });
  startFilters();
  startDrops();
}

export function showQuery(moved = false) {
  active = Math.min(active, Math.max(0, state.parts.length - 1));
  const part = state.parts[active];
  $("preview").hidden = $("clear").hidden = !part;
  $("invite").hidden = Boolean(part);
  $("query").classList.toggle("empty", !part);
  $("choose").textContent = part ? "Add pictures" : "Choose pictures";
  $("choose").hidden = state.parts.length >= MAX_PARTS;
  $("full").hidden = !$("choose").hidden;
  if (part) {
    const address = pictureOf(part, 1024);
    if ($("shown").getAttribute("src") !== address) $("shown").src = address;
    $("shown").alt = `Query picture: ${nameOf(part)}`;
    $("crop").textContent = part.crop ? "Whole picture" : "Search a part";
    $("crop-text").hidden = Boolean(part.crop);
    box.set(part.crop ?? null);
  }
  const focused = document.activeElement?.dataset.role, at = document.activeElement?.closest("#parts li");
  const was = at ? [...$("parts").children].indexOf(at) : -1;
  // One picture alone needs no tile: it is shown above.
  $("parts").hidden = state.parts.length === 1 && part.weight > 0;
  $("parts").replaceChildren(...state.parts.map(tile));
  if (was >= 0) ($("parts").children[was]?.querySelector(`[data-role=${focused}]`) ?? $("choose")).focus();
  // What is being written stays, unless somebody goes back.
  for (const name of ["where", "k"]) if (moved || $(name) !== document.activeElement) $(name).value = state[name];
  setTo("confidence", String(state.confidence), `${state.confidence} or better`);
  $("rerank").checked = state.rerank;
  $("ranking").hidden = !part;
  setTo("root", state.root);
}

export function offerFilters({ columns, roots, patches }) {
  $("column-list").replaceChildren(...Object.entries(columns).map(([name, about]) => el("div", {},
    el("dt", {}, el("button", { type: "button", class: "code", onclick: () => insert(name) }, name)),
    el("dd", {}, about))));
  for (const { path } of roots) offer("root", path);
  $("rerank-label").hidden = !patches;
}

function offer(select, value, text = value) {
  const known = [...$(select).options].some((option) => option.value === value);
  if (!known) $(select).append(el("option", { value }, text));
}

function setTo(select, value, text) {
  offer(select, value, text);
  $(select).value = value;
}

function changePart(i, change) {
  const parts = state.parts.map((part, j) => j === i ? { ...part, ...change } : part);
  go({ parts }, { replace: "crop" in change });
}

function tile(part, i) {
  const name = nameOf(part), minus = part.weight < 0;
  const picture = el("img", { src: pictureOf(part, 128), alt: "", draggable: "false" });
  picture.addEventListener("error", () => picture.replaceWith(el("span", {}, name)));
  const choose = () => {
    active = i;
    showQuery();
  };
  return el("li", { class: `${minus ? "minus" : "plus"}${i === active ? " active" : ""}` },
    el("button", { type: "button", "data-role": "show", class: "tile", title: name, onclick: choose,
      "aria-pressed": String(i === active), "aria-label": `Show picture ${i + 1}: ${name}` }, picture),
    el("button", { type: "button", "data-role": "sign", title: minus ? "Unlike this" : "Like this",
      "aria-label": minus ? `Picture ${i + 1} is unlike: make it like` : `Picture ${i + 1} is like: make it unlike`,
      onclick: () => changePart(i, { weight: -part.weight }) }, minus ? "−" : "+"),
    el("button", { type: "button", "data-role": "remove", title: "Remove", "aria-label": `Remove picture ${i + 1}`,
      onclick: () => go({ parts: state.parts.filter((_, j) => j !== i) }) }, "×"));
}

function startFilters() {
  const apply = () => {
    if (!$("filter-form").reportValidity()) return;
    go({
      where: $("where").value.trim(), root: $("root").value, k: Number($("k").value),
      confidence: Number($("confidence").value), rerank: $("rerank").checked,
    }, { replace: true });
  };
  $("filter-form").addEventListener("submit", (event) => {
    event.preventDefault();
    apply();
  });
  for (const name of ["root", "k", "confidence", "rerank"]) $(name).addEventListener("change", apply);
  $("where").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      apply();
    } else if (event.key === "Escape") $("where").blur();
  });
  $("filters").open = wide.matches || Boolean(state.where || state.root);
  addEventListener("keydown", (event) => {
    const writing = event.target.matches?.("input:not([type=checkbox], [type=range]), textarea, select");
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || writing || $("search").hidden
      || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    $("filters").open = true;
    $("where").focus();
  });
}

function insert(column) {
  const { selectionStart, selectionEnd } = $("where");
  $("where").setRangeText(column, selectionStart, selectionEnd, "end");
  $("where").focus();
}

// A file starts anew wherever it is dropped, except on the query, to which it is added; so is a picture of the page.
function startDrops() {
  const kindOf = (event) => {
    const types = event.dataTransfer.types, onQuery = Boolean(event.target.closest?.("#query"));
    if (types.includes(DRAGGED)) return onQuery ? "add" : null;
    return types.includes("Files") && !document.querySelector("dialog[open]") ? (onQuery ? "add" : "anew") : null;
  };
  const show = (kind, dragged) => {
    $("query").classList.toggle("target", kind === "add");
    $("drop").hidden = kind !== "anew" || dragged;
    $("drop").firstElementChild.textContent = "Drop to search with it";
  };
  addEventListener("dragover", (event) => {
    const kind = kindOf(event);
    show(kind, event.dataTransfer.types.includes(DRAGGED));
    if (!kind && !event.dataTransfer.types.includes("Files")) return;
    event.preventDefault(); // else the browser would open a file in place of the page
    event.dataTransfer.dropEffect = kind ? "copy" : "none";
  });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) show(null); });
  addEventListener("drop", (event) => {
    const kind = kindOf(event), id = event.dataTransfer.getData(DRAGGED), files = [...event.dataTransfer.files];
    show(null);
    if (kind || files.length) event.preventDefault();
    if (kind) addParts(id ? [{ id, weight: 1 }] : files.map((file) => upload(file)), { anew: kind === "anew" });
  });
  addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length || document.querySelector("dialog[open]")) return;
    event.preventDefault();
    addParts(files.map((file) => upload(file)), { anew: true });
  });
}
