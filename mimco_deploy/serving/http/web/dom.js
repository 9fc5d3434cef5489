// What every part of the page needs: elements, words and numbers. Foreign text only ever becomes text nodes.

export const $ = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

export function say(text) {
  $("status").textContent = text;
}

// A message, or none where the text is empty.
export function warn(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

export const number = (value) => value.toLocaleString("en");
export const count = (value, word) => `${number(value)} ${value === 1 ? word : word + "s"}`;
export const fileName = (path) => path.slice(Math.max(path.lastIndexOf("/"), path.lastIndexOf("\\")) + 1) || path;
export const date = (text) => text.replace("T", " ").replace(/(\.\d+)?(Z|\+00:00)$/, " UTC");

export function size(bytes) {
  const unit = Math.min(4, Math.floor(Math.log(Math.max(bytes, 1)) / Math.log(1000)));
  const value = (bytes / 1000 ** unit).toLocaleString("en", { maximumSignificantDigits: 3 });
  return `${value} ${["B", "kB", "MB", "GB", "TB"][unit]}`;
}

export function facts(list, pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  list.replaceChildren(...shown.map(([term, ...values]) => el("div", {}, el("dt", {}, term),
    ...values.flat().map((value) => el("dd", {}, value)))));
}
