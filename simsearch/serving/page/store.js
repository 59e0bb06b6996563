// What the page knows: where it is, what it shows, what it has seen. Modules change `page` and say so by `go` or
// `changed`.

import { $ } from "./dom.js";
import { paths, renewing, request } from "./api.js";
import { START } from "./address.js";

export const STEP = 24; // results, and how many more at a time
export const MOST = 120;
export const EXAMPLES = 16; // images that a search may have of each kind

export function nothing() {
  return { key: null, works: [], total: 0, done: true };
}

export const page = {
  state: { ...START },
  catalogs: [],
  shown: nothing(), // what stands in #works
  k: STEP,
  anyway: false, // show the nearest although none is similar
  explained: 0, // which of the like images stands large and is explained
  wish: null, // the id whose heat map is on
  pinned: false, // by a click, whatever the pointer does
};

export const known = new Map(); // id -> work, of this catalog
export const works = $("#works");
export const large = $("#large");
export const help = $("#help");
export const catalog = () => page.catalogs.find((c) => c.name === page.state.catalog) ?? page.catalogs[0];
export const edition = () => `${catalog().name} ${catalog().version}`; // what is known of another one holds no more
export const partNames = () => Object.keys(catalog().parts ?? {});
export const searching = () => page.state.like.length > 0;
export const sameImage = (a) => (b) => a.id === b.id && a.upload === b.upload;
export const sameRef = (a) => (b) => sameImage(a)(b) && String(a.region ?? "") === String(b.region ?? "");

const asked = new Map(); // edition and id -> the work to come
export async function workOf(id) {
  if (known.has(id)) return known.get(id);
  const key = `${edition()} ${id}`;
  if (!asked.has(key)) asked.set(key, renewing(() => request(paths.item(page.state.catalog, id))).finally(() => asked.delete(key)));
  const work = await asked.get(key);
  if (key === `${edition()} ${id}`) known.set(id, work); // else the collection was replaced meanwhile
  return work;
}

export const cards = () => [...works.querySelectorAll(".work:not(.skeleton)")];
export const cardOf = (id) => works.querySelector(`.work[data-id="${CSS.escape(id)}"]`);

// One work at a time is in the order of the Tab key, with its buttons.
export function activate(card, focus = true) {
  for (const button of works.querySelectorAll('button[tabindex="0"]')) button.tabIndex = -1;
  if (!card) return;
  for (const button of card.querySelectorAll("button")) button.tabIndex = 0;
  if (focus) $(".frame", card).focus();
}
