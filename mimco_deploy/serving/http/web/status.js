// The index: what it holds, how it is searched, and its updates.

import { call, events } from "./api.js";
import { $, count, el, facts, number, say, size, warn } from "./dom.js";

const DOING = { walk: "Looking through the folders", index: "Reading and embedding pictures",
  tuning: "Making search fast" };

let followed = null;
let changed = async () => {};

export function startIndex(report, whenChanged) {
  changed = whenChanged;
  $("update").addEventListener("click", () => report(async () => {
    $("update").disabled = true;
    try {
      follow(await call("jobs", { method: "POST", json: { retry_problems: $("retry").checked } }));
    } finally {
      $("update").disabled = false;
    }
  }));
  $("cancel").addEventListener("click", () => report(async () => {
    $("cancel").disabled = true; // the job ends after its batch
    await call(`jobs/${encodeURIComponent(followed.id)}`, { method: "DELETE" });
  }));
}

export async function loadIndex() {
  const [status, version, jobs] = await Promise.all(["index", "version", "jobs"].map((path) => call(path)));
  $("numbers").replaceChildren(...[[number(status.files), "files"], [number(status.contents), "different pictures"],
    [number(status.problems), "problems"], [size(status.bytes), "on disk"]].map(([value, name]) =>
    el("li", {}, el("strong", {}, value), ` ${name}`)));
  $("folders").replaceChildren(...status.roots.map(folder));
  facts($("index-facts"), [["Search", howSearched(status.search)],
    ["Encoder", `${version.provider}, ${version.precision}`],
    ["Fingerprint", status.fingerprint.slice(0, 16)], ["Embedding", `${number(status.embedding_dim)} numbers`],
    ["Reasons", status.patches ? "parts of two pictures can be compared" : "this encoder cannot compare parts"],
    ["State", `generation ${status.generation}, revision ${number(status.revision)}`], ["mimco", version.version]]);
  const running = jobs.find(isUnderWay);
  if (running) follow(running);
  say(running ? "The index is being updated" : `${count(status.files, "file")} in the index`);
}

function folder({ path, reachable, files, problems }) {
  const about = el("p", { class: "soft" }, `${count(files, "file")}, ${count(problems, "problem")}`);
  if (!reachable) about.append(" · ", el("span", { class: "bad" }, "not reachable now"));
  return el("li", {}, el("p", { class: "path" }, path), about);
}

function howSearched({ kind, reason, recall }) {
  if (kind === "exact") return `exact, ${reason}`;
  const found = typeof recall === "number" ? `; finds ${recall.toFixed(3)} of the true 10 nearest` : "";
  return `approximate (${kind})${found}; ${reason}`;
}

function isUnderWay({ state }) {
  return state === "running" || state === "cancelling";
}

function follow(job) {
  showJob(job);
  if (followed?.id === job.id || !isUnderWay(job)) return;
  const stream = events(job.id);
  followed = { id: job.id, stream };
  stream.addEventListener("progress", ({ data }) => {
    const now = JSON.parse(data);
    showJob(now);
    if (!isUnderWay(now)) end(now);
  });
  // The browser connects again by itself, unless the server refused.
  stream.addEventListener("error", async () => {
    if (stream.readyState !== EventSource.CLOSED || followed?.stream !== stream) return;
    followed = null;
    $("job").hidden = $("cancel").hidden = true; // as when the service was started anew, which knows no such job
    $("update").hidden = false;
    await changed();
    warn($("failure"), "The progress of the update cannot be followed.");
  });
}

function end(job) {
  followed.stream.close();
  followed = null;
  changed();
  say(`Update ${job.state}`);
}

function showJob({ state, done, total, images_per_s, waiting, doing, report, error }) {
  const running = isUnderWay({ state });
  $("job").hidden = false;
  $("update").hidden = running;
  $("cancel").disabled = state === "cancelling";
  $("cancel").hidden = $("job-bar").hidden = !running;
  if (running && !total) $("job-bar").removeAttribute("value");
  else [$("job-bar").max, $("job-bar").value] = [Math.max(total, 1), done];
  const speed = images_per_s ? `, ${images_per_s.toFixed(images_per_s < 10 ? 1 : 0)} pictures/s` : "";
  const waits = waiting >= 0.01 ? `, encoder waits ${Math.round(100 * waiting)} % of the time` : "";
  const found = Object.entries(report ?? {}).filter(([, value]) => value);
  const counts = found.map(([name, value]) => name === "unreachable" ?
    `${count(value, "folder")} could not be read` : `${name} ${number(value)}`);
  const ends = { done: "Done", cancelled: "Cancelled", failed: `Failed: ${error ?? "no reason given"}` };
  const far = total ? `: ${number(done)} of ${number(total)}` : "";
  const does = state === "cancelling" ? "Stopping after this batch" : DOING[doing] ?? doing;
  $("job-text").textContent = running ? does + far + speed + waits :
    [ends[state], ...counts].join(" · ");
}
