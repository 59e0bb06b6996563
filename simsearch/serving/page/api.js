// The HTTP API: addresses, errors in words, one retry where the server is busy, uploads that outlive their token.
// Every request for a catalog says for which version of it the page asks: another one is refused (409).

const LONGEST_WAIT = 10; // seconds
const LARGEST = 6000; // pixels of the longer side of what the server shows at most
const SHRUNK = 1600; // pixels of the longer side of what is sent at most: no encoder looks at more

export class ApiError extends Error {
  constructor(status, message, about = {}) {
    super(message);
    this.status = status;
    this.about = about;
  }
}

const wait = (seconds, signal) =>
  new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal?.addEventListener("abort", () => (clearTimeout(timer), reject(signal.reason)), { once: true });
  });

async function errorOf(response) {
  const said = await response.json().catch(() => null);
  const text = typeof said?.error === "string" ? said.error : `The server answered ${response.status}. Try again.`;
  return new ApiError(response.status, text, said ?? {});
}

// Calls `busy(seconds)` before it waits for its single retry.
export async function request(path, { busy = () => {}, signal, ...options } = {}) {
  for (let attempt = 0; ; attempt++) {
    let response;
    try {
      response = await fetch(path, { ...options, signal });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server cannot be reached. Is it still running?");
    }
    if (response.ok) return response.json();
    if (![429, 503].includes(response.status) || attempt) throw await errorOf(response);
    const seconds = Math.min(LONGEST_WAIT, Number(response.headers.get("Retry-After")) || 1);
    busy(seconds);
    await wait(seconds, signal);
  }
}

export const post = (path, body, options) =>
  request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...options });

const versions = new Map(); // of the catalogs, by name: with it, a browser keeps their pictures for good

export async function readCatalogs(options) {
  const catalogs = await request("api/catalogs", options);
  for (const { name, version } of catalogs) versions.set(name, version ?? "");
  return catalogs;
}

const of = (catalog, kind, query = {}) =>
  `api/catalogs/${encodeURIComponent(catalog)}/${kind}?${new URLSearchParams({ ...query, v: versions.get(catalog) ?? "" })}`;
export const paths = {
  items: (catalog, query) => of(catalog, "items", query),
  some: (catalog) => of(catalog, "items"),
  item: (catalog, id) => of(catalog, "item", { id }),
  values: (catalog, query) => of(catalog, "values", query),
  search: (catalog) => of(catalog, "search"),
  heatmap: (catalog) => of(catalog, "heatmap"),
  thumbnail: (catalog, id) => of(catalog, "thumbnail", { id }),
  image: (catalog, id) => of(catalog, "image", { id }),
  whole: (catalog, id) => of(catalog, "image", { id, side: LARGEST }), // to look at closely
  upload: (token) => `api/uploads/${encodeURIComponent(token)}/image`,
};

// The page's own name of an upload, its first token -> {token, file, url, width, height}; all but the token may
// be missing, for one that came with the address.
const uploads = new Map();

export function upload(name) {
  if (!uploads.has(name)) uploads.set(name, { token: name, file: null, url: paths.upload(name) });
  return uploads.get(name);
}

async function send(file, options) {
  const body = new FormData();
  body.append("file", file, file.name || "pasted");
  return request("api/uploads", { method: "POST", body, ...options });
}

// The file at the size that is sent; as it is where it is small, or no image that the browser can open.
async function shrink(file) {
  const picture = await createImageBitmap(file).catch(() => null);
  const scale = picture ? SHRUNK / Math.max(picture.width, picture.height) : 1;
  if (scale >= 1) return file;
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(picture.width * scale)), Math.max(1, Math.round(picture.height * scale)));
  const context = canvas.getContext("2d");
  context.fillStyle = "white"; // behind what is transparent, as the server has it
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const smaller = await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 });
  return new File([smaller], file.name || "pasted", { type: smaller.type });
}

// The name of a new upload.
export async function addUpload(given, options) {
  const file = await shrink(given);
  const answer = await send(file, options);
  // The person sees their own file, which may show more than what is sent.
  uploads.set(answer.upload, { token: answer.upload, file, url: URL.createObjectURL(given), width: answer.width, height: answer.height });
  return answer.upload;
}

// As the API wants it: an item's id, or the token that an upload has now, and the part of it.
export const sent = (ref) => ({ ...("id" in ref ? { id: ref.id } : { upload: upload(ref.upload).token }), ...(ref.region && { region: ref.region }) });

// What a search names and the server has no more: `refs`.
export class Lost extends Error {
  constructor(refs) {
    const items = refs.filter((ref) => "id" in ref).map((ref) => `“${ref.id}”`);
    const images = refs.length - items.length;
    super([
      images ? `${images === 1 ? "An image" : `${images} images`} of this search ${images === 1 ? "is" : "are"} no longer on the server: drop ${images === 1 ? "it" : "them"} again.` : "",
      items.length ? `${items.join(", ")} ${items.length === 1 ? "is" : "are"} not in this collection.` : "",
    ].filter(Boolean).join(" "));
    this.refs = refs;
  }
}

// `call()`, once more where uploads had expired whose files are here. Raises Lost for what cannot be had again.
export async function renewing(call, options) {
  for (let again = true; ; again = false) {
    try {
      return await call();
    } catch (error) {
      if (!error.about?.missing?.length) throw error;
      const lost = [];
      const missing = new Map(error.about.missing.map(({ id, upload: token }) => [JSON.stringify([id, token]), { id, token }])); // parts of one image are one
      for (const { id, token } of missing.values()) {
        const [name, kept] = [...uploads].find(([, one]) => one.token === token) ?? [token];
        if (kept?.file && again) kept.token = (await send(kept.file, options)).upload;
        else lost.push(token === undefined ? { id } : { upload: name });
      }
      if (lost.length) throw new Lost(lost);
    }
  }
}
