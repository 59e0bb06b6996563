// What the page shows, as the text after # in its address.

import { sound } from "./region.js";

export const START = {
  catalog: "", like: [], unlike: [], searches: [], selection: [], weights: null, where: [], text: "", seed: 1,
  diversity: 0, collapse: true, hubness: false, open: null,
};

// Conditions are JSON, as the API has them: {attribute, values, low, high, negate}, of which all but the attribute may be
// missing. The server says what is wrong with one.
function readWhere(text) {
  let given;
  try {
    given = JSON.parse(text || "[]");
  } catch {
    return [];
  }
  const isCondition = (c) => typeof c?.attribute === "string" && (c.values === undefined || Array.isArray(c.values));
  const says = ([, value]) => value !== null && value !== "" && value.length !== 0; // "": an open end in older addresses
  return Array.isArray(given) ? given.filter(isCondition).map((c) => Object.fromEntries(Object.entries(c).filter(says))) : [];
}

// Images are an item's id, or ~ and an upload's name; after @ the part of it that is searched with, x:y:w:h in fractions.
// Ids are any text: what separates and marks is escaped in them.
const escaped = (id) => id.replace(/[%,@]|^~/g, (sign) => encodeURIComponent(sign).replace("~", "%7E"));
const refText = (ref) => ("id" in ref ? escaped(ref.id) : `~${ref.upload}`) + (ref.region ? `@${ref.region.join(":")}` : "");
function refOf(text) {
  const [, name, part] = text.match(/^(.*?)(?:@((?:[\d.]+:){3}[\d.]+))?$/s);
  const region = part && sound(part.split(":").map(Number));
  const ref = name.startsWith("~") ? { upload: name.slice(1) } : { id: unescaped(name) };
  return region ? { ...ref, region } : ref;
}
function unescaped(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}
const refs = (text) => (text ?? "").split(",").filter(Boolean).map(refOf);
const share = (text, otherwise) => {
  const value = Number(text ?? NaN);
  return value >= 0 && value <= 1 ? value : otherwise;
};

export function readAddress(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const weights = (given.get("weights") ?? "").split(",").map((pair) => pair.split(":"));
  const weighed = weights.filter(([name, value]) => name && Number(value) >= 0);
  return {
    catalog: given.get("catalog") ?? "",
    like: refs(given.get("like")),
    unlike: refs(given.get("unlike")),
    searches: refs(given.get("searches")),
    selection: refs(given.get("selection")).flatMap((ref) => ref.id ?? []),
    weights: weighed.length ? Object.fromEntries(weighed.map(([name, value]) => [name, Number(value)])) : null,
    where: readWhere(given.get("where")),
    text: given.get("text") ?? "",
    seed: Number.parseInt(given.get("seed"), 10) || START.seed,
    diversity: share(given.get("diversity"), 0),
    collapse: given.get("collapse") !== "0",
    hubness: given.get("hubness") === "1",
    open: given.get("open") || null,
  };
}

export function writeAddress(state) {
  const said = {
    catalog: state.catalog,
    like: state.like.map(refText).join(","),
    unlike: state.unlike.map(refText).join(","),
    searches: state.searches.map(refText).join(","),
    selection: state.selection.map(escaped).join(","),
    weights: state.weights && Object.entries(state.weights).map(([name, value]) => `${name}:${value}`).join(","),
    where: state.where.length ? JSON.stringify(state.where) : "",
    text: state.text,
    seed: state.seed === START.seed ? "" : state.seed,
    diversity: state.diversity || "",
    collapse: state.collapse ? "" : "0",
    hubness: state.hubness ? "1" : "",
    open: state.open ?? "",
  };
  const kept = Object.entries(said).filter(([, value]) => value !== "" && value !== null);
  // Easier to read than URLSearchParams' own text, and read by it all the same.
  return "#" + kept.map(([name, value]) => `${name}=${encodeURIComponent(value).replace(/%2C/g, ",").replace(/%3A/g, ":").replace(/%2F/g, "/").replace(/%40/g, "@")}`).join("&");
}
