// A box over a picture: drawn, moved and resized by pointer or keys, in shares of the picture.

import { el } from "./dom.js";

const LEAST = 0.03;
const STEP = 0.02;
const SETTLED_MS = 350;
const ARROWS = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };

export class CropBox {
  // `frame` has exactly the size of its picture; `changed` gets [left, top, width, height] or null.
  constructor(frame, changed) {
    this.frame = frame;
    this.changed = changed;
    const corners = ["nw", "ne", "sw", "se"].map((corner) => el("i", { "data-corner": corner }));
    const role = { role: "group", "aria-roledescription": "crop box" };
    this.box = el("div", { id: "crop-box", tabindex: 0, hidden: true, ...role }, ...corners);
    frame.append(this.box);
    frame.addEventListener("pointerdown", (event) => this.#start(event));
    this.box.addEventListener("keydown", (event) => this.#key(event));
  }

  set(crop) {
    this.crop = crop;
    this.box.hidden = !crop;
    if (!crop) return;
    const [left, top, width, height] = crop.map((share) => `${(100 * share).toFixed(2)}%`);
    for (const [name, value] of Object.entries({ left, top, width, height })) this.box.style.setProperty(name, value);
    const [l, t, w, h] = crop.map((share) => Math.round(100 * share));
    this.box.setAttribute("aria-label", `${w} by ${h} percent of the picture, ${l} from the left, ${t} from the top. ` +
      "Arrow keys move, with Shift they resize, Delete removes.");
  }

  #at(event) {
    const { left, top, width, height } = this.frame.getBoundingClientRect();
    return [(event.clientX - left) / width, (event.clientY - top) / height];
  }

  #start(event) {
    const inside = event.target.closest("#crop-box");
    // A finger beside the box scrolls the page.
    if (event.button || (!inside && event.pointerType === "touch")) return;
    event.preventDefault();
    const from = this.#at(event), before = this.crop, corner = event.target.dataset.corner;
    const move = (moved) => {
      const to = this.#at(moved);
      if (corner) this.set(spanned(opposite(before, corner), to));
      else if (inside) this.set(shifted(before, to[0] - from[0], to[1] - from[1]));
      else if (Math.hypot(to[0] - from[0], to[1] - from[1]) > LEAST) this.set(spanned(from, to));
    };
    const end = (ended) => {
      for (const kind of ["pointerup", "pointercancel"]) this.frame.removeEventListener(kind, end);
      this.frame.removeEventListener("pointermove", move);
      if (ended.type === "pointercancel") this.set(before);
      else if (this.crop !== before) this.changed(this.crop);
      this.box.focus({ preventScroll: true });
    };
    this.frame.setPointerCapture(event.pointerId);
    this.frame.addEventListener("pointermove", move);
    for (const kind of ["pointerup", "pointercancel"]) this.frame.addEventListener(kind, end);
  }

  #key(event) {
    const [x, y] = ARROWS[event.key] ?? [0, 0];
    const remove = event.key === "Delete" || event.key === "Backspace";
    if (!remove && !x && !y) return;
    event.preventDefault();
    const [left, top, width, height] = this.crop;
    if (remove) this.set(null);
    else if (event.shiftKey) {
      this.set(spanned([left, top], [left + Math.max(LEAST, width + x), top + Math.max(LEAST, height + y)]));
    } else this.set(shifted(this.crop, x, y));
    clearTimeout(this.settling);
    this.settling = setTimeout(() => this.changed(this.crop), remove ? 0 : SETTLED_MS);
  }
}

const within = (value, most = 1) => Math.min(most, Math.max(0, value));
const rounded = (crop) => crop.map((share) => Math.round(share * 1e4) / 1e4);

function opposite([left, top, width, height], corner) {
  return [corner.includes("w") ? left + width : left, corner.includes("n") ? top + height : top];
}

function shifted([left, top, width, height], x, y) {
  return rounded([within(left + x, 1 - width), within(top + y, 1 - height), width, height]);
}

function spanned(from, to) {
  const low = [0, 1].map((axis) => within(Math.min(from[axis], to[axis]), 1 - LEAST));
  const high = [0, 1].map((axis) => Math.max(low[axis] + LEAST, within(Math.max(from[axis], to[axis]))));
  return rounded([...low, high[0] - low[0], high[1] - low[1]]);
}
