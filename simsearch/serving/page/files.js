// Images from outside: chosen, dropped, pasted.

import { $ } from "./dom.js";
import { addUpload } from "./api.js";
import { EXAMPLES, page, searching, STEP } from "./store.js";
import { busy, say, tell } from "./notes.js";
import { failed, go } from "./route.js";
import { summary } from "./results.js";
import { search } from "./acts.js";
import { closeLarge } from "./view.js";
import { MOST_SEARCHES, searchEach } from "./searches.js";

export const ITEM = "application/x-simsearch-item";

async function take(files, to) {
  const images = [...files].filter((file) => !file.type || file.type.startsWith("image/")).slice(0, to === "each" ? MOST_SEARCHES : EXAMPLES);
  if (!images.length) return tell("That is not an image. Use a JPEG, PNG or WebP file.");
  document.body.classList.add("busy");
  say(images.length === 1 ? "Reading your image…" : `Reading ${images.length} images…`);
  const refs = [];
  for (const file of images) {
    try {
      refs.push({ upload: await addUpload(file, { busy }) });
    } catch (error) {
      failed(error);
    }
  }
  document.body.classList.remove("busy");
  say(page.shown.works.length ? summary(page.shown) : "");
  if (!refs.length) return;
  page.k = STEP;
  if (to === "each" && refs.length > 1) return searchEach(refs);
  if (to === "unlike" && searching()) return go({ unlike: [...page.state.unlike, ...refs].slice(-EXAMPLES) });
  const add = to === "like" && searching();
  if (!add) page.explained = 0;
  go(add ? { like: [...page.state.like, ...refs].slice(-EXAMPLES), text: "" } : { like: refs, unlike: [], searches: [], selection: [], text: "" });
}

let fileTo = "new";

function chooseFile(to) {
  fileTo = to;
  $("#file").value = "";
  $("#file").click();
}

export function listenFiles() {
  const drop = $("#drop");
  let depth = 0;
  const ours = (event) => event.dataTransfer?.types.includes(ITEM) || event.dataTransfer?.types.includes("Files") || event.dataTransfer?.types.includes("text/uri-list");
  const hide = () => { depth = 0; drop.hidden = true; };
  addEventListener("dragenter", (event) => {
    if (!ours(event)) return;
    event.preventDefault();
    depth++;
    drop.classList.toggle("one", !searching());
    drop.classList.toggle("several", [...event.dataTransfer.items].filter((item) => item.kind === "file").length > 1);
    drop.hidden = false;
  });
  addEventListener("dragleave", (event) => { if (ours(event) && --depth <= 0) hide(); });
  addEventListener("dragend", hide);
  addEventListener("dragover", (event) => {
    if (!ours(event)) return;
    event.preventDefault();
    const over = event.target.closest?.("[data-to]");
    for (const zone of drop.children) zone.classList.toggle("over", zone === over);
  });
  addEventListener("drop", (event) => {
    if (!ours(event)) return;
    event.preventDefault();
    const to = event.target.closest?.("[data-to]")?.dataset.to ?? "new";
    hide();
    const data = event.dataTransfer;
    const item = data.getData(ITEM);
    if (item) return search({ id: item }, { add: to === "like", list: to === "unlike" ? "unlike" : "like" });
    if (data.files.length) return take(data.files, to);
    tell("Your browser passed on only the address of that image. Copy the image and paste it here, or save it first.");
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    if (page.state.open !== null) closeLarge();
    take(files, "new");
  });
  $("#file").addEventListener("change", (event) => take(event.target.files, fileTo));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-file]");
    if (button) chooseFile(button.dataset.file);
  });
}
