// What the page shows, kept in the address: back, forward and a bookmark restore it. Of uploaded pictures only this
// browser knows what their names stand for, and for a while only.

import { isName, keep, kept, newName } from "./uploads.js";

const VIEWS = ["search", "map", "duplicates", "problems", "index"];
export const MAX_PARTS = 8;

const withAddress = (file) => ({ file, address: URL.createObjectURL(file) });
const uploads = new Map();
keep(); // drops what is old
await restore();
const listeners = [];
export let state = parse(location.hash);

// Listeners are told whether it was by going back or forward.
export function onChange(listener) {
  listeners.push(listener);
}

export function go(changes, { replace = false } = {}) {
  const next = { ...state, ...changes, lost: "parts" in changes ? [] : state.lost };
  const address = link(next);
  if (address !== link(state)) history[replace ? "replaceState" : "pushState"](null, "", address);
  state = next;
  tell();
}

export function link(shown) {
  const words = new URLSearchParams();
  if (shown.view !== "search") words.set("view", shown.view);
  for (const part of shown.parts) {
    words.append("part", [part.upload ?? part.id, part.weight, ...(part.crop ?? [])].join("_"));
  }
  for (const part of shown.lost) words.append("part", part);
  for (const name of ["where", "root"]) if (shown[name]) words.set(name, shown[name]);
  if (shown.k !== 24) words.set("k", shown.k);
  if (shown.confidence) words.set("confidence", shown.confidence);
  if (shown.rerank) words.set("rerank", "1");
  return `#${words}`;
}

export const likeThis = (id) => link({ ...state, view: "search", parts: [{ id, weight: 1 }], lost: [] });

// Keeps a file and gives the part of a query that names it.
export function upload(file, weight = 1) {
  const name = newName();
  uploads.set(name, withAddress(file));
  keep(name, file);
  return { upload: name, weight };
}

export const uploaded = (part) => uploads.get(part.upload);

// Parts of a request as the API has them, and the files that they name.
export function requestParts(parts) {
  const files = [...new Set(parts.filter((part) => part.upload).map((part) => uploaded(part).file))];
  const named = parts.map(({ upload, ...part }) =>
    upload ? { ...part, upload: files.indexOf(uploaded({ upload }).file) } : part);
  return { parts: named, files };
}

function parse(hash) {
  const words = new URLSearchParams(hash.slice(1));
  const view = words.get("view"), k = Math.round(Number(words.get("k")));
  return {
    view: VIEWS.includes(view) ? view : "search",
    parts: words.getAll("part").slice(0, MAX_PARTS).map(parsePart).filter(Boolean),
    lost: words.getAll("part").slice(0, MAX_PARTS).filter((part) => isName(part) && !parsePart(part)),
    where: words.get("where") ?? "",
    root: words.get("root") ?? "",
    k: k >= 1 && k <= 1000 ? k : 24,
    confidence: Math.min(1, Math.max(0, Number(words.get("confidence")) || 0)),
    rerank: words.has("rerank"),
  };
}

function parsePart(text) {
  const [name, weight, ...crop] = text.split("_");
  const known = uploads.has(name) ? { upload: name } : /^[0-9a-f]{64}$/.test(name) ? { id: name } : null;
  if (!known) return null;
  const shares = crop.map(Number);
  const cropped = shares.length === 4 && shares.every((share) => share >= 0 && share <= 1);
  return { ...known, weight: Number(weight) < 0 ? -1 : 1, ...(cropped && { crop: shares }) };
}

// Uploads that the address names and this page does not know: of a page before, or of another tab.
async function restore() {
  const words = new URLSearchParams(location.hash.slice(1)).getAll("part");
  if (!words.some((word) => isName(word) && !uploads.has(word.split("_")[0]))) return;
  for (const { name, file } of await kept()) if (!uploads.has(name)) uploads.set(name, withAddress(file));
}

function tell(moved = false) {
  for (const listener of listeners) listener(moved);
}

addEventListener("popstate", async () => {
  await restore();
  state = parse(location.hash);
  tell(true);
});
