// A grid of pictures. One card is in the order of Tab; arrow keys move to the others.

import { original, thumbnail } from "./api.js";
import { el, fileName } from "./dom.js";
import { likeThis } from "./state.js";

export const DRAGGED = "application/x-mimco-id";
const WORDS = { clear: "clear match", likely: "likely", unsure: "unsure", chance: "by chance" };

export class Grid {
  // `open` is called with all items and the number of the one to show.
  constructor(list, open) {
    this.list = list;
    this.open = open;
    this.items = [];
    list.addEventListener("keydown", (event) => this.#move(event));
    list.addEventListener("focusin", (event) => this.#enter(event.target.closest("li")));
  }

  show(items) {
    const focused = this.list.contains(document.activeElement);
    this.items = [];
    this.list.replaceChildren();
    this.append(items);
    if (focused) this.focus(0);
  }

  append(items) {
    const first = this.items.length;
    this.items = [...this.items, ...items];
    this.list.append(...items.map((item, i) => this.#card(item, first + i)));
    if (!first && items.length) this.#enter(this.list.firstElementChild);
  }

  focus(i) {
    this.list.children[i]?.querySelector("a").focus();
  }

  #card(item, i) {
    const name = fileName(item.path);
    const picture = el("img", { src: thumbnail(item.id), alt: "", loading: "lazy", decoding: "async" });
    picture.addEventListener("error", () => picture.replaceWith(el("span", { class: "soft" }, "no picture")));
    const show = el("a", {
      href: original(item.id), class: "well", title: item.path, tabindex: -1, "aria-label": label(item, name),
      onclick: (event) => {
        if (event.ctrlKey || event.metaKey || event.shiftKey) return;
        event.preventDefault();
        this.open(this.items, i);
      },
    }, picture);
    const like = el("a", { href: likeThis(item.id), class: "like", tabindex: -1 }, "More like this");
    const card = el("li", {
      ondragstart: (event) => {
        event.dataTransfer.setData(DRAGGED, item.id);
        event.dataTransfer.effectAllowed = "copy";
      },
    }, show, like);
    if (item.score !== undefined) card.append(scoreLine(item));
    card.append(el("p", { class: "name", title: item.path }, name));
    return card;
  }

  #enter(card) {
    for (const link of this.list.querySelectorAll('a[tabindex="0"]')) link.tabIndex = -1;
    for (const link of card?.querySelectorAll("a") ?? []) link.tabIndex = 0;
  }

  #move(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const cards = [...this.list.children], at = cards.indexOf(event.target.closest("li"));
    const firstBelow = cards.findIndex((card) => card.offsetTop > cards[0].offsetTop);
    const across = firstBelow < 0 ? cards.length : firstBelow;
    const to = {
      ArrowLeft: at - 1, ArrowRight: at + 1, ArrowUp: at - across, ArrowDown: at + across,
      Home: 0, End: cards.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.focus(to);
  }
}

export function scoreLine({ score, word, chance }) {
  const told = chance === null || chance === undefined ? "" :
    `About ${Number(chance.toPrecision(2))} pictures of the index would score this by chance`;
  return el("p", { class: "line" }, el("span", { class: `word ${word}`, title: told }, WORDS[word] ?? word),
    el("span", { title: "Cosine of the embeddings: 1 is the same picture" }, score.toFixed(3)));
}

function label({ score, word }, name) {
  if (score === undefined) return name;
  return [name, `score ${score.toFixed(3)}`, WORDS[word] ?? word].filter(Boolean).join(", ");
}
