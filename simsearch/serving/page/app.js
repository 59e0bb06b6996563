// The page begins: catalogs are read, the rooms listen, the address says the rest.

import { $, h } from "./dom.js";
import { readCatalogs } from "./api.js";
import { page, works } from "./store.js";
import { busy } from "./notes.js";
import { arrive, failed, onChange } from "./route.js";
import { drawFailed, drawSkeletons, extend, show } from "./results.js";
import { drawBar, drawChips, drawFacets, listenBar } from "./bar.js";
import { drawSide, listenTuning } from "./side.js";
import { listenFiles } from "./files.js";
import { drawLarge, listenLarge } from "./view.js";
import { listenPart } from "./part.js";
import { drawSearches, listenSearches } from "./searches.js";
import { drawSelection, listenSelection } from "./kept.js";
import { listenKeys, listenWorks } from "./listen.js";

onChange((scroll) => {
  drawBar();
  drawChips();
  drawSearches();
  drawSelection();
  drawSide();
  drawFacets();
  drawLarge();
  show(scroll);
});

async function begin() {
  history.scrollRestoration = "manual";
  drawSkeletons();
  try {
    page.catalogs = await readCatalogs({ busy });
    if (!page.catalogs.length) throw new Error("The server has no catalog: start it with catalog=<folder>.");
  } catch (error) {
    drawFailed(begin);
    return failed(error);
  }
  $("#catalog").replaceChildren(...page.catalogs.map((c) => h("option", { value: c.name }, c.name)));
  $("#catalog-box").hidden = page.catalogs.length < 2;
  listenBar();
  listenTuning();
  listenWorks();
  listenKeys();
  listenLarge();
  listenFiles();
  listenPart();
  listenSearches();
  listenSelection();
  new IntersectionObserver(([entry]) => entry.isIntersecting && extend(), { rootMargin: "900px" }).observe($("#more"));
  addEventListener("popstate", arrive);
  arrive();
}

// The link's address would take the place of the page's own.
$(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  works.focus({ preventScroll: true });
  works.scrollIntoView();
});
begin();
