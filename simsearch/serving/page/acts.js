// What can be done with a work or an image: search with it, avoid it, open it, see what matches.

import { EXAMPLES, page, sameRef, searching, STEP } from "./store.js";
import { tell } from "./notes.js";
import { go } from "./route.js";
import { toggleHeat } from "./explain.js";
import { toggleKept } from "./kept.js";

export function search(ref, { add = false, list = "like" } = {}) {
  page.k = STEP;
  if (list === "unlike") {
    if (!searching()) return tell("First choose a work to search with, then one to avoid.");
    if (page.state.unlike.some(sameRef(ref))) return;
    if (page.state.unlike.length >= EXAMPLES) return tell(`A search takes at most ${EXAMPLES} images to avoid.`);
    return go({ unlike: [...page.state.unlike, ref], like: withoutLast(ref), open: null });
  }
  if (add && searching()) {
    if (page.state.like.some(sameRef(ref))) return;
    if (page.state.like.length >= EXAMPLES) return tell(`A search takes at most ${EXAMPLES} images.`);
    return go({ like: [...page.state.like, ref], unlike: page.state.unlike.filter((other) => !sameRef(ref)(other)), text: "", open: null });
  }
  page.explained = 0;
  go({ like: [ref], unlike: [], text: "", selection: [], open: null });
}

// A work that is to be avoided is no longer searched with, unless nothing else is.
function withoutLast(ref) {
  const left = page.state.like.filter((other) => !sameRef(ref)(other));
  return left.length ? left : page.state.like;
}

export function act(name, id, event) {
  if (name === "more") search({ id }, { add: event.shiftKey });
  else if (name === "unlike") search({ id }, { list: "unlike" });
  else if (name === "heat") toggleHeat(id);
  else if (name === "open") go({ open: id });
  else if (name === "keep") toggleKept(id);
}
