// The filters' drawer: a searchable list of values for each attribute, and ranges of numbers.

import { $, debounce, h } from "./dom.js";
import { paths, request } from "./api.js";
import { failed } from "./route.js";

const LISTED = 40;
const FIRST = ["artist", "style", "period", "year", "genre", "medium", "museum", "license"];
const OWN = new Set(["path", "id", "work", "group_id", "sha1", "sha256", "width", "height", "title"]);

// Attributes that it makes sense to filter by, the usual ones first.
export function facetsOf(catalog) {
  const place = (a) => (FIRST.indexOf(a.name) + 1 || FIRST.length + 1);
  return catalog.attributes
    .filter((a) => !OWN.has(a.name))
    .filter((a) => (a.kind === "number" ? a.low < a.high : a.distinct > 1 && a.distinct <= Math.max(50, catalog.items / 2)))
    .sort((a, b) => place(a) - place(b));
}

const listed = (where, attribute, negate) => where.find((c) => c.attribute === attribute && c.values && Boolean(c.negate) === negate)?.values ?? [];
const isRange = (c, attribute) => c.attribute === attribute && !c.values && !c.negate && (c.low ?? c.high) !== undefined;

// `where` with this value of the attribute asked for ("is"), ruled out ("not") or free ("").
export function withValue(where, attribute, value, wish) {
  const next = where.map((c) => (c.attribute === attribute && c.values ? { ...c, values: c.values.filter((v) => v !== value) } : c));
  if (wish) {
    const negate = wish === "not";
    const group = next.find((c) => c.attribute === attribute && c.values && Boolean(c.negate) === negate);
    if (group) group.values.push(value);
    else next.push({ attribute, values: [value], ...(negate && { negate }) });
  }
  return next.filter((c) => !c.values || c.values.length);
}

// `where` with this range of the attribute, whose ends may be null.
export function withRange(where, attribute, low, high) {
  const next = where.filter((c) => !isRange(c, attribute));
  if (low === null && high === null) return next;
  return [...next, { attribute, ...(low !== null && { low }), ...(high !== null && { high }) }];
}

// What the conditions say in words, each with the conditions that are left without it.
export const inWords = (where) =>
  where.flatMap((c) => {
    const not = c.negate ? "not " : "";
    if (c.values) return c.values.map((v) => [not + (String(v).trim() || `${c.attribute} unknown`), withValue(where, c.attribute, v, "")]);
    const range = `${not}${c.attribute} ${c.low ?? "…"}–${c.high ?? "…"}`;
    const known = `${c.attribute} ${c.negate ? "unknown" : "known"}`;
    return [[(c.low ?? c.high) === undefined ? known : range, where.filter((other) => other !== c)]];
  });

function choices(catalog, attribute, where, change) {
  const list = h("ul", { class: "values" });
  const find = h("input", { type: "search", placeholder: `Find ${attribute.name}`, "aria-label": `Find values of ${attribute.name}`, autocomplete: "off" });
  let turn = 0;
  async function fill() {
    const mine = ++turn;
    const query = { attribute: attribute.name, prefix: find.value.trim(), limit: LISTED };
    let values;
    try {
      values = await request(paths.values(catalog.name, query));
    } catch (error) {
      if (mine !== turn) return;
      if (error.status === 409) return failed(error);
      return list.replaceChildren(h("li", { class: "soft" }, error.message));
    }
    if (mine !== turn) return;
    const now = where();
    const [wanted, barred] = [listed(now, attribute.name, false), listed(now, attribute.name, true)];
    const known = values.map(({ value, count }) => ({ value: String(value), count }));
    // Chosen ones stay in sight, whatever is typed.
    const rest = [...wanted, ...barred].filter((v) => !known.some(({ value }) => value === v)).map((value) => ({ value, count: null }));
    list.replaceChildren(...[...rest, ...known].map(({ value, count }) => {
      const is = wanted.includes(value);
      const not = barred.includes(value);
      const press = (wish) => () => change(withValue(where(), attribute.name, value, wish));
      return h("li", { class: is ? "is" : not ? "not" : null },
        h("label", {}, h("input", { type: "checkbox", checked: is, onchange: press(is ? "" : "is") }), h("span", {}, value), count === null ? null : h("small", {}, String(count))),
        h("button", { type: "button", class: "link", "aria-pressed": String(not), "aria-label": `Not ${value}`, onclick: press(not ? "" : "not") }, "not"));
    }));
    if (!list.children.length) list.append(h("li", { class: "soft" }, "No such value"));
  }
  find.addEventListener("input", debounce(fill, 150));
  const few = attribute.distinct <= 8;
  return { body: [few ? null : find, list], fill };
}

function range(attribute, where, change) {
  const now = where().find((c) => isRange(c, attribute.name));
  const end = (name, label, value) =>
    h("label", {}, h("span", { class: "unseen" }, `${attribute.name} ${label}`),
      h("input", { type: "number", step: "any", "data-end": name, placeholder: String(attribute[name]), value: value ?? "" }));
  const box = h("div", { class: "range", "data-range": attribute.name }, end("low", "from", now?.low), h("span", {}, "to"), end("high", "to", now?.high));
  const read = (name) => {
    const value = $(`[data-end=${name}]`, box).valueAsNumber;
    return Number.isNaN(value) ? null : value;
  };
  box.addEventListener("input", debounce(() => change(withRange(where(), attribute.name, read("low"), read("high"))), 400));
  return box;
}

// Fills `place`; `where()` are the conditions now, `change(where)` makes them others. Returns a function that
// shows the present conditions.
export function facets(place, catalog, where, change) {
  const fills = [];
  place.replaceChildren(...facetsOf(catalog).map((attribute, i) => {
    const active = where().some((c) => c.attribute === attribute.name);
    const title = h("summary", {}, attribute.name.replace(/_/g, " "));
    if (attribute.kind === "number") return h("details", { open: active || i < 4 }, title, range(attribute, where, change));
    const { body, fill } = choices(catalog, attribute, where, change);
    const box = h("details", { open: active || i < 2 }, title, body);
    const shown = () => box.open && fill();
    box.addEventListener("toggle", shown);
    fills.push(shown);
    return box;
  }));
  return () => {
    fills.forEach((shown) => shown());
    for (const input of place.querySelectorAll("[data-end]")) {
      const now = where().find((c) => isRange(c, input.closest("[data-range]").dataset.range));
      if (document.activeElement !== input) input.value = now?.[input.dataset.end] ?? "";
    }
  };
}
