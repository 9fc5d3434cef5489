// The HTTP API: JSON in and out, patient with a busy server, and asking for a token where one is needed.
// All addresses are relative, so that the page also works below a path of a proxy.

const RETRIES = 3;
const OF_A_PART = 1024; // bytes of a form around a file, at most

export class ApiError extends Error {
  constructor(status, detail, type = "") {
    super(detail);
    this.status = status;
    this.type = type;
  }
}

let askForToken = async () => {};
let whileBusy = () => {};
let signingIn = null;
let mostBytes = Infinity;

export function connect(hooks) {
  ({ askForToken, whileBusy } = hooks);
}

export const thumbnail = (id, px = 256) => `v1/pictures/${id}/thumbnail?px=${px}`;
export const original = (id) => `v1/pictures/${id}/file`;
export const events = (job) => new EventSource(`v1/jobs/${encodeURIComponent(job)}/events`);

export async function call(path, { method = "GET", params = {}, json, form, signal } = {}) {
  const query = new URLSearchParams(Object.entries(params).filter(([, value]) => value !== "" && value !== null));
  const address = `v1/${path}${query.size ? `?${query}` : ""}`;
  const headers = json === undefined ? {} : { "Content-Type": "application/json" };
  const body = json === undefined ? form : JSON.stringify(json);
  for (let tried = 0; ;) {
    const response = await send(address, { method, headers, body, signal });
    if (response.status === 401) {
      signingIn ??= askForToken().finally(() => { signingIn = null; });
      await signingIn;
    } else if (response.status === 503 && tried < RETRIES) {
      tried++;
      const seconds = Math.min(60, Number(response.headers.get("Retry-After")) || 1);
      whileBusy(`The server is busy. Trying again in ${seconds} s (${tried} of ${RETRIES}).`);
      await pause(1000 * seconds, signal);
    } else if (!response.ok) {
      throw await errorOf(response);
    } else {
      return response.status === 204 ? null : response.json();
    }
  }
}

export function limitUploads(bytes) {
  mostBytes = bytes;
}

// A request with the files of its parts, once each, or as JSON where there are none. What the service would refuse is
// not sent: a browser that is cut off in its upload does not show why.
export function withFiles(request, files) {
  if (!files.length) return { method: "POST", json: request };
  const bytes = files.reduce((sum, { size }) => sum + size + OF_A_PART, JSON.stringify(request).length);
  if (bytes > mostBytes) {
    const mb = (count) => (count / 1e6).toFixed(1);
    throw new ApiError(413, `${files.length > 1 ? "These pictures have" : "This picture has"} ${mb(bytes)} MB; `
      + `the service takes ${mb(mostBytes)} MB at once.`);
  }
  const form = new FormData();
  form.append("request", JSON.stringify(request));
  for (const file of files) form.append("file", file, file.name);
  return { method: "POST", form };
}

export async function signIn(token) {
  const response = await send("v1/session", { method: "POST", headers: { Authorization: `Bearer ${token}` } });
  if (!response.ok) throw await errorOf(response);
}

async function send(address, options) {
  try {
    return await fetch(address, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    const why = options.body instanceof FormData ? ", or closed the connection since the upload is too large" : "";
    throw new ApiError(0, `The server does not answer${why}.`);
  }
}

async function errorOf(response) {
  // A browser that was cut off in its upload has the status alone.
  const { detail, title, type } = await response.json().catch(() => ({}));
  const told = typeof detail === "string" && detail;
  const short = response.status === 413 ? "This is more than the service takes at once." :
    title || `The server answered ${response.status}.`;
  return new ApiError(response.status, told || short, type);
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, ms);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}
