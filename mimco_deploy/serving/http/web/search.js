// What the search view shows: the hits of the query, or all pictures where there is none.

import { call, withFiles } from "./api.js";
import { openDetail } from "./detail.js";
import { $, count, say, warn } from "./dom.js";
import { Grid } from "./grid.js";
import { link, requestParts, state } from "./state.js";

const PAGE = 60;
const LOST = "A picture of this search was uploaded and is not kept any more. Choose it again.";
let grid;
let shownFor = null;
let running = new AbortController();
let after = null;

export function startSearch() {
  grid = new Grid($("hits"), (items, i) => openDetail(items, i, state.parts[0]));
  $("more").addEventListener("click", async () => {
    const first = grid.items.length;
    await guarded(() => browse(true));
    grid.focus(first);
  });
}

export async function showHits({ again = false } = {}) {
  const wanted = link({ ...state, view: "search" });
  if (wanted === shownFor && !again) return;
  shownFor = wanted;
  running.abort();
  running = new AbortController();
  $("results-title").textContent = state.parts.length && !state.lost.length ? "Hits" : "Pictures";
  // Without one of its pictures it would be another search.
  const failed = await guarded(() => state.parts.length && !state.lost.length ? search() : browse(false));
  if (!failed) return;
  grid.show([]);
  $("more").hidden = true;
  warn($("nothing"), "");
}

// Whether it failed, which is shown.
async function guarded(work) {
  const { signal } = running;
  $("hits").setAttribute("aria-busy", "true");
  try {
    await work();
    for (const name of ["where-error", "failure"]) warn($(name), "");
  } catch (error) {
    if (signal.aborted) return false;
    shownFor = null;
    const ofFilter = error.type === "urn:mimco:condition";
    warn($("where-error"), ofFilter ? error.message : "");
    warn($("failure"), ofFilter ? "" : error.message);
    if (ofFilter) $("filters").open = true;
    $("where").setAttribute("aria-invalid", String(ofFilter));
    say("");
    return true;
  } finally {
    if (!signal.aborted) $("hits").removeAttribute("aria-busy");
  }
  $("where").removeAttribute("aria-invalid");
  return false;
}

async function search() {
  const { signal } = running, { parts, files } = requestParts(state.parts);
  const query = { parts, k: state.k, where: state.where, root: state.root || null, min_confidence: state.confidence,
    rerank: state.rerank };
  say("Searching …");
  const { hits, searched, timings_ms } = await call("search", { ...withFiles(query, files), signal });
  const items = hits.map(({ id, path, score, confidence_word, expected_by_chance }) =>
    ({ id, path, score, word: confidence_word, chance: expected_by_chance }));
  grid.show(items);
  after = null;
  $("more").hidden = true;
  const byChance = items.every(({ word }) => word === "chance");
  warn($("nothing"), !searched ? "The index holds no picture." :
    !items.length ? "No picture is what the filters ask for." :
    byChance ? "Nothing here really matches. These are the closest that there are." : "");
  const ms = Object.values(timings_ms).reduce((sum, part) => sum + part, 0);
  say(`${count(items.length, "hit")} in ${Math.round(ms)} ms, of ${count(searched, "picture")}`);
  scrollTo({ top: 0 });
}

async function browse(further) {
  const { signal } = running;
  const params = { where: state.where, root: state.root, limit: PAGE, after: further ? after : null };
  const { pictures, next } = await call("pictures", { params, signal });
  const items = pictures.map(({ id, paths }) => ({ id, path: paths[0] }));
  if (further) grid.append(items);
  else grid.show(items);
  after = next;
  $("more").hidden = !next;
  warn($("nothing"), state.lost.length ? LOST :
    grid.items.length ? "" : "No pictures here.");
  say(`${count(grid.items.length, "picture")}${next ? " so far" : ""}`);
}
