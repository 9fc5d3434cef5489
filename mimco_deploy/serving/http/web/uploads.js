// Uploaded pictures, kept by the browser: a page that is loaded again, or another tab, finds the query of its address.
// The newest few, for a day; nothing of them is kept where the browser has no room or does not allow it.

const STORE = "uploads", MOST = 32, FOR_MS = 24 * 3600 * 1000, PATIENCE_MS = 2000;
let opened = null;

// A name no other upload has, of this page or of one before; names rise with time.
export const newName = () => `u${Date.now().toString(36)}-${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;
export const isName = (name) => name.startsWith("u");

// All that are there; none where the browser does not say in time.
export async function kept() {
  try {
    const all = await Promise.race([read(), new Promise((_, reject) => { setTimeout(reject, PATIENCE_MS); })]);
    return all.filter(({ since }) => since > Date.now() - FOR_MS);
  } catch {
    return [];
  }
}

const read = async () => done((await open()).transaction(STORE).objectStore(STORE).getAll());

// Keeps one more where there is one, and drops what is old.
export async function keep(name, file) {
  try {
    const store = (await open()).transaction(STORE, "readwrite").objectStore(STORE), now = Date.now();
    if (file) store.put({ name, file, since: now });
    const all = (await done(store.getAll())).sort((a, b) => b.since - a.since);
    for (const { name: old } of all.filter(({ since }, i) => i >= MOST || since < now - FOR_MS)) store.delete(old);
  } catch {
    // It lives as long as the page.
  }
}

function open() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open("mimco", 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "name" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => reject(request.error);
  });
  return opened;
}

const done = (request) => new Promise((resolve, reject) => {
  request.onsuccess = () => resolve(request.result);
  request.onerror = () => reject(request.error);
});
