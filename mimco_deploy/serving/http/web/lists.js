// Duplicates and problems: what to look at in the collection.

import { call } from "./api.js";
import { openDetail } from "./detail.js";
import { $, count, el, number, say } from "./dom.js";
import { Grid } from "./grid.js";

const GROUPS = 30;
const PROBLEMS = 100;
let groups = GROUPS;
let after = null;

export function startDuplicates(report) {
  $("alike").addEventListener("input", () => { $("alike-value").textContent = Number($("alike").value).toFixed(2); });
  $("alike").addEventListener("change", () => report(loadDuplicates(GROUPS)));
  $("more-groups").addEventListener("click", () => report(loadDuplicates(groups + GROUPS)));
}

export async function loadDuplicates(limit = groups) {
  groups = limit;
  say("Looking for duplicates …");
  const found = await call("duplicates", { params: { min_score: $("alike").value, limit } });
  $("groups").replaceChildren(...found.groups.map(groupCard));
  $("more-groups").hidden = found.groups.length >= found.total;
  $("group-count").textContent = found.total ?
    "The first of each group is the one to keep. Nothing is moved from here." : "No two pictures are that alike.";
  say(`${count(found.total, "group")} of pictures that are there more than once`);
}

function groupCard({ files }, i) {
  const list = el("ul", { class: "grid", "aria-label": `Group ${i + 1}` });
  const grid = new Grid(list, (items, at) => openDetail(items, at, { id: files[0].id, weight: 1 }, "Kept"));
  grid.show(files.map(({ id, path, kind, score }) => ({ id, path, score, word: kind })));
  return el("li", { class: "card" }, list);
}

export function startProblems(report) {
  $("more-problems").addEventListener("click", () => report(loadProblems(true)));
}

export async function loadProblems(further = false) {
  const params = { limit: PROBLEMS, after: further ? after : null };
  const { problems, total, next } = await call("problems", { params });
  const rows = problems.map(({ path, problem, found }) => el("tr", {}, el("td", { class: "path" }, path),
    el("td", {}, problem.replaceAll("_", " ")), el("td", { class: "soft" }, found)));
  if (further) $("problem-rows").append(...rows);
  else $("problem-rows").replaceChildren(...rows);
  after = next;
  $("more-problems").hidden = !next;
  $("problem-table").hidden = !total;
  $("problem-count").textContent = total ? `${count(total, "file")} could not be read as a picture.` :
    "Every file could be read.";
  say(`${number($("problem-rows").children.length)} of ${count(total, "problem")} shown`);
}
