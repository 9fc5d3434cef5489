// Ties the views together: tabs, errors, the token, and what is loaded when.

import { call, connect, limitUploads, signIn } from "./api.js";
import { allowWhy, startDetail } from "./detail.js";
import { $, say, warn } from "./dom.js";
import { loadDuplicates, loadProblems, startDuplicates, startProblems } from "./lists.js";
import { loadMap, startMap } from "./map.js";
import { addParts, offerFilters, showQuery, startQuery } from "./query.js";
import { showHits, startSearch } from "./search.js";
import { go, onChange, state } from "./state.js";
import { loadIndex, startIndex } from "./status.js";

const LOAD = {
  search: () => showHits({ again: true }),
  map: loadMap,
  duplicates: loadDuplicates,
  problems: loadProblems,
  index: loadIndex,
};
const NAMES = Object.keys(LOAD);
const stale = new Set();
const said = {};
let known = "";
let view = "";

// Runs what may fail, a promise or a function of one, and shows why it did.
async function report(work) {
  warn($("failure"), "");
  try {
    await (typeof work === "function" ? work() : work);
    return true;
  } catch (error) {
    say("");
    warn($("failure"), error.message);
    return false;
  }
}

function show(moved) {
  const visited = state.view !== view;
  if (visited) {
    said[view] = $("status").textContent;
    view = state.view;
    say(said[view] ?? "");
    warn($("failure"), "");
  }
  for (const name of NAMES) {
    const tab = $(`tab-${name}`), chosen = name === view;
    $(name).hidden = !chosen;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
  }
  document.title = `${$(`tab-${view}`).textContent} · mimco`;
  showQuery(moved);
  load(visited && view !== "search");
}

// Other processes write to the index too: what was loaded of another state of it is loaded again.
async function learn() {
  const status = await call("index");
  offerFilters(status);
  allowWhy(status.patches);
  limitUploads(status.max_upload_bytes);
  const { generation, revision, files, problems, bytes } = status;
  const now = [generation, revision, files, problems, bytes].join();
  for (const name of now === known ? ["problems", "index"] : NAMES) stale.add(name);
  known = now;
}

async function load(again = false) {
  // First of all, and alone: where a token is needed, it is asked for once.
  if ((again || !known) && !await report(learn)) return;
  const wanted = view;
  if (stale.delete(wanted)) {
    say("");
    if (!await report(LOAD[wanted])) stale.add(wanted);
  } else if (view === "search") showHits();
}

function startTabs() {
  for (const name of NAMES) $(`tab-${name}`).addEventListener("click", () => {
    go({ view: name });
    scrollTo({ top: 0 });
  });
  $("tabs").addEventListener("keydown", (event) => {
    const at = NAMES.indexOf(view), last = NAMES.length - 1;
    const to = { ArrowLeft: at ? at - 1 : last, ArrowRight: at < last ? at + 1 : 0, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    go({ view: NAMES[to] });
    $(`tab-${NAMES[to]}`).focus();
  });
}

// A token in the address is used once and does not stay there.
async function useTokenOfAddress() {
  const words = new URLSearchParams(location.hash.slice(1)), token = words.get("token");
  if (!token) return;
  words.delete("token");
  history.replaceState(null, "", words.size ? `#${words}` : location.pathname + location.search);
  await signIn(token).catch(() => {}); // where it does not fit, the first call asks for another
}

function askForToken() {
  return new Promise((resolve, reject) => {
    const dialog = $("sign-in"), stop = new AbortController(), { signal } = stop;
    $("token").value = "";
    warn($("token-error"), "");
    $("token-cancel").addEventListener("click", () => dialog.close(), { signal });
    dialog.addEventListener("close", () => {
      stop.abort();
      reject(new Error("This service needs a token. Load the page again to give one."));
    }, { signal });
    $("token-form").addEventListener("submit", async (event) => {
      event.preventDefault();
      try {
        await signIn($("token").value.trim());
        resolve();
        dialog.close();
      } catch (error) {
        warn($("token-error"), error.status === 401 ? "This token is not accepted." : error.message);
        $("token").select();
      }
    }, { signal });
    dialog.showModal();
  });
}

async function start() {
  connect({ askForToken, whileBusy: say });
  startTabs();
  startQuery();
  startSearch();
  startDetail();
  startMap((id) => addParts([{ id, weight: 1 }], { anew: true }));
  startDuplicates(report);
  startProblems(report);
  startIndex(report, () => {
    known = "";
    return load();
  });
  onChange(show);
  await useTokenOfAddress();
  show();
}

start();
