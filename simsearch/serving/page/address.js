// What the page shows, as the text after # in its address, and the filters' grammar.

export const START = {
  catalog: "", like: [], unlike: [], weights: null, where: [], text: "", seed: 1,
  diversity: 0, collapse: true, hubness: false, open: null,
};

const NUMBER = /^-?\d+(\.\d+)?$/;

// One condition: {attribute, values, negate} or {attribute, low, high}, whose ends may be "".
export function parseWhere(text) {
  const conditions = [];
  for (const part of text.split(";")) {
    const found = part.match(/^\s*(.+?)\s*(!?=)\s*(.+?)\s*$/);
    if (!found) continue;
    const [, attribute, sign, value] = found;
    const ends = value.split("..").map((end) => end.trim());
    if (sign === "=" && ends.length === 2 && ends.every((end) => end === "" || NUMBER.test(end))) {
      conditions.push({ attribute, low: ends[0], high: ends[1] });
    } else {
      conditions.push({ attribute, values: value.split("|").map((v) => v.trim()), negate: sign === "!=" });
    }
  }
  return conditions;
}

export const formatWhere = (conditions) =>
  conditions
    .map((c) => (c.values ? `${c.attribute}${c.negate ? "!=" : "="}${c.values.join("|")}` : `${c.attribute}=${c.low}..${c.high}`))
    .join("; ");

// Whether the grammar, which knows no quotes, can say this value.
export const sayable = (value) => !/[;|]|\.\./.test(value) && value.trim() === value && value !== "" && value !== "*";

const refText = (ref) => ("id" in ref ? String(ref.id) : `u${ref.upload}`);
const refOf = (text) => (text.startsWith("u") ? { upload: text.slice(1) } : { id: Number(text) });
const refs = (text) => (text ?? "").split(",").filter(Boolean).map(refOf).filter((r) => r.upload || Number.isInteger(r.id));
const share = (text, otherwise) => {
  const value = Number(text ?? NaN);
  return value >= 0 && value <= 1 ? value : otherwise;
};

export function readAddress(hash) {
  const given = new URLSearchParams(hash.replace(/^#/, ""));
  const weights = (given.get("weights") ?? "").split(",").map((pair) => pair.split(":"));
  const sound = weights.filter(([name, value]) => name && Number(value) >= 0);
  return {
    catalog: given.get("catalog") ?? "",
    like: refs(given.get("like")),
    unlike: refs(given.get("unlike")),
    weights: sound.length ? Object.fromEntries(sound.map(([name, value]) => [name, Number(value)])) : null,
    where: parseWhere(given.get("where") ?? ""),
    text: given.get("text") ?? "",
    seed: Number.parseInt(given.get("seed"), 10) || START.seed,
    diversity: share(given.get("diversity"), 0),
    collapse: given.get("collapse") !== "0",
    hubness: given.get("hubness") === "1",
    open: /^\d+$/.test(given.get("open") ?? "") ? Number(given.get("open")) : null,
  };
}

export function writeAddress(state) {
  const said = {
    catalog: state.catalog,
    like: state.like.map(refText).join(","),
    unlike: state.unlike.map(refText).join(","),
    weights: state.weights && Object.entries(state.weights).map(([name, value]) => `${name}:${value}`).join(","),
    where: formatWhere(state.where),
    text: state.text,
    seed: state.seed === START.seed ? "" : state.seed,
    diversity: state.diversity || "",
    collapse: state.collapse ? "" : "0",
    hubness: state.hubness ? "1" : "",
    open: state.open ?? "",
  };
  const kept = Object.entries(said).filter(([, value]) => value !== "" && value !== null);
  // Easier to read than URLSearchParams' own text, and read by it all the same.
  return "#" + kept.map(([name, value]) => `${name}=${encodeURIComponent(value).replace(/%2C/g, ",").replace(/%3A/g, ":")}`).join("&");
}
