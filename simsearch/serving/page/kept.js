// The selection drawn: its button, the marks on works, and its page with what can be done with it.

import { $, h, icon } from "./dom.js";
import { START, writeAddress } from "./address.js";
import { EXAMPLES, known, large, page, searching, works } from "./store.js";
import { tell } from "./notes.js";
import { go } from "./route.js";
import { isKept, isOwn, keep, kept, MOST_KEPT, onSelection } from "./selection.js";

export const showing = () => page.state.selection.length > 0 && !searching();

export function toggleKept(id) {
  const own = showing() && isOwn(page.state.selection);
  const ids = kept();
  if (!ids.includes(id) && ids.length >= MOST_KEPT) return tell(`A selection holds at most ${MOST_KEPT} works.`);
  keep(ids.includes(id) ? ids.filter((other) => other !== id) : [...ids, id]);
  if (own) go({ selection: kept() }, { replace: true });
}

// The marks on what stands on the page.
export function drawMarks() {
  const mark = (button, id) => {
    const on = isKept(id);
    button.setAttribute("aria-pressed", String(on));
    const label = on ? "Remove from the selection" : "Keep in the selection";
    button.title = label;
    if (!$("span", button)) button.setAttribute("aria-label", label);
  };
  for (const button of works.querySelectorAll('[data-act="keep"]')) mark(button, button.closest(".work").dataset.id);
  for (const button of large.querySelectorAll('[data-act="keep"]')) mark(button, page.state.open);
}

export function drawSelection() {
  const ids = kept();
  $("#selection-open").hidden = !ids.length;
  $("#selection-count").textContent = ids.length;
  drawMarks();
  const box = $("#selection");
  box.hidden = !showing();
  if (!showing()) return;
  const given = page.state.selection;
  const own = isOwn(given);
  const action = (text, name, onclick, strong) => h("button", { type: "button", class: `tool${strong ? " strong" : ""}`, onclick }, icon(name), h("span", {}, text));
  box.replaceChildren(
    h("h2", {}, own ? "Your selection" : "A selection that was shared with you"),
    h("div", { class: "selection-acts" },
      own ? null : action("Keep these works", "keep", () => { keep([...kept(), ...given]); go({ selection: given }, { replace: true }); drawSelection(); }, true),
      action("Search with these", "similar", () => go({ like: given.slice(0, EXAMPLES).map((id) => ({ id })), unlike: [], selection: [], open: null }), own),
      action("Save as CSV", "save", saveCsv),
      action("Copy the works' links", "link", () => copy(given.map(workLink).join("\n"), `${given.length} links are in the clipboard.`)),
      action("Copy a link to it", "link", () => copy(selectionLink(given), "The link is in the clipboard: whoever opens it sees these works.")),
      own ? action("Empty it", "close", () => { keep([]); go({ selection: [] }); }) : null));
}

const here = (state) => location.href.replace(/#.*/s, "") + writeAddress({ ...START, catalog: page.state.catalog, ...state });
const workLink = (id) => here({ open: id });
const selectionLink = (ids) => here({ selection: ids });

async function copy(text, done) {
  try {
    await navigator.clipboard.writeText(text);
    return tell(done);
  } catch {
    // Only secure pages may: select it for the person.
  }
  const dialog = $("#copy");
  $("#copy-text").value = text;
  dialog.showModal();
  $("#copy-text").select();
}

// A spreadsheet takes text that begins so for a formula.
const cell = (value) => {
  const text = String(value ?? "");
  const harmless = /^[=+\-@\t\r]/.test(text) && !/^[+-]?\d+(\.\d+)?$/.test(text) ? `'${text}` : text;
  return /[",\n\r]/.test(harmless) ? `"${harmless.replace(/"/g, '""')}"` : harmless;
};

export function csvOf(found) {
  const names = [...new Set(found.flatMap((work) => Object.keys(work.attributes ?? {})))].filter((name) => name !== "id");
  const rows = found.map((work) => [work.id, workLink(work.id), ...names.map((name) => work.attributes?.[name])]);
  return [["id", "link", ...names], ...rows].map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
}

function saveCsv() {
  const found = page.state.selection.map((id) => known.get(id)).filter(Boolean);
  const url = URL.createObjectURL(new Blob(["\ufeff", csvOf(found)], { type: "text/csv" })); // the mark tells spreadsheets that it is UTF-8
  const link = h("a", { href: url, download: `selection-${page.state.catalog}.csv` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

export function listenSelection() {
  onSelection(drawSelection);
  $("#selection-open").addEventListener("click", () => go({ selection: kept(), like: [], unlike: [], text: "", open: null }));
}
