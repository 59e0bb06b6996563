// Pointer and keys on the works.

import { $ } from "./dom.js";
import { withValue } from "./filters.js";
import { neighbour } from "./works.js";
import { activate, cards, help, large, page, searching, works } from "./store.js";
import { go } from "./route.js";
import { toggleFilters } from "./bar.js";
import { toggleTuning } from "./side.js";
import { act, search } from "./acts.js";
import { ITEM } from "./files.js";
import { cool, resting, toggleHeat } from "./explain.js";
import { step, toggleBeside, zoom } from "./view.js";
import { toggleKept } from "./kept.js";

const ZOOM = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: null };

export function listenWorks() {
  works.addEventListener("click", (event) => {
    const chip = event.target.closest("[data-attribute]");
    const card = event.target.closest(".work");
    if (chip) return go({ where: withValue(page.state.where, chip.dataset.attribute, chip.dataset.value, "is") });
    const button = event.target.closest("[data-act]");
    if (button && card) act(button.dataset.act, card.dataset.id, event);
  });
  works.addEventListener("focusin", (event) => {
    const card = event.target.closest(".work");
    if (card && $(".frame", card)?.tabIndex !== 0) activate(card, false);
  });
  works.addEventListener("pointerover", (event) => {
    const card = event.target.closest(".result .hold")?.parentElement;
    if (!card || event.pointerType !== "mouse" || !$("#hover").checked || page.pinned) return;
    if (page.wish === card.dataset.id) return;
    cool();
    resting(card.dataset.id);
  });
  works.addEventListener("pointerout", (event) => {
    if (page.pinned || !event.target.closest(".hold") || event.relatedTarget?.closest?.(".hold") === event.target.closest(".hold")) return;
    cool();
  });
  works.addEventListener("dragstart", (event) => {
    const card = event.target.closest(".work");
    if (card) event.dataTransfer.setData(ITEM, card.dataset.id);
  });
  works.addEventListener("keydown", (event) => {
    const card = event.target.closest(".work");
    if (!card || event.ctrlKey || event.metaKey || event.altKey) return;
    const id = card.dataset.id;
    if (/^(Arrow|Home$|End$)/.test(event.key)) {
      const next = neighbour(cards(), card, event.key);
      if (next) activate(next);
      event.preventDefault();
    } else if (event.key === "Enter" && event.target.closest(".frame")) {
      event.preventDefault();
      act("more", id, event);
    }
  });
}

export function listenKeys() {
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=range], [type=checkbox]), select, textarea");
    if (event.key === "Escape" && !event.defaultPrevented) {
      if (document.querySelector("dialog[open]")) return; // dialogs close themselves
      if (!$("#filters").hidden) return toggleFilters(false);
      if ($("#tuning").classList.contains("open")) return toggleTuning(false);
      if (page.wish !== null) { page.pinned = false; return cool(); }
      if (typing) event.target.blur();
      return;
    }
    if (typing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]:not(#large)")) return;
    const id = large.open ? page.state.open : document.activeElement?.closest(".work")?.dataset.id ?? $(".work:hover")?.dataset.id ?? null;
    const key = event.key.toLowerCase();
    const arrow = event.key.startsWith("Arrow");
    if (large.open && (event.key === "ArrowLeft" || event.key === "ArrowRight")) step(event.key === "ArrowLeft" ? -1 : 1);
    else if (large.open && event.key === "Enter" && !event.target.closest("button")) act("more", id, event);
    else if (key === "h" && id !== null) toggleHeat(id);
    else if (key === "k" && id !== null) toggleKept(id);
    else if (large.open && event.key in ZOOM) zoom(ZOOM[event.key]);
    else if (large.open && key === "c" && searching()) toggleBeside();
    else if (key === "n" && id !== null) search({ id }, { list: "unlike" });
    else if (large.open) return;
    else if (event.key === "/") $("#text").focus();
    else if (event.key === "?") help.showModal();
    else if (arrow && event.target === document.body && cards().length) activate(cards().find((card) => card.getBoundingClientRect().bottom > 60) ?? cards()[0]);
    else return;
    event.preventDefault();
  });
}
