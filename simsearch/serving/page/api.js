// The HTTP API: addresses, errors in words, one retry where the server is busy, uploads that outlive their token.

const LONGEST_WAIT = 10; // seconds
const SHRUNK = 1600; // pixels of the longer side of an image that was too large to send

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
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
  return new ApiError(response.status, text);
}

// `busy(seconds)` is told of a wait before the one retry.
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

const of = (catalog) => `api/catalogs/${encodeURIComponent(catalog)}`;
const view = (catalog, id, kind) => `${of(catalog)}/items/${id}/${kind}?v=${encodeURIComponent(versions.get(catalog) ?? "")}`;
export const paths = {
  items: (catalog, query) => `${of(catalog)}/items?${new URLSearchParams(query)}`,
  item: (catalog, id) => `${of(catalog)}/items/${id}`,
  values: (catalog, query) => `${of(catalog)}/values?${new URLSearchParams(query)}`,
  search: (catalog) => `${of(catalog)}/search`,
  heatmap: (catalog) => `${of(catalog)}/heatmap`,
  thumbnail: (catalog, id) => view(catalog, id, "thumbnail"),
  image: (catalog, id) => view(catalog, id, "image"),
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

async function shrink(file) {
  const picture = await createImageBitmap(file);
  const scale = Math.min(1, SHRUNK / Math.max(picture.width, picture.height));
  const canvas = new OffscreenCanvas(Math.round(picture.width * scale), Math.round(picture.height * scale));
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new File([await canvas.convertToBlob({ type: "image/jpeg", quality: 0.92 })], file.name || "pasted");
}

// The name of a new upload. A file that is too large for the server goes once more, smaller.
export async function addUpload(file, options) {
  let answer;
  try {
    answer = await send(file, options);
  } catch (error) {
    if (error.status !== 413) throw error;
    file = await shrink(file).catch(() => Promise.reject(error));
    answer = await send(file, options);
  }
  uploads.set(answer.upload, { token: answer.upload, file, url: URL.createObjectURL(file), width: answer.width, height: answer.height });
  return answer.upload;
}

// As the API wants it: an item's id, or the token that an upload has now.
export const sent = (ref) => ("id" in ref ? { id: ref.id } : { upload: upload(ref.upload).token });

// Sends the files of these uploads again where the server has let go of them; the names it could not save.
async function renew(names, options) {
  const lost = [];
  for (const name of names) {
    const kept = upload(name);
    if ((await fetch(paths.upload(kept.token), options)).ok) continue;
    if (kept.file) kept.token = (await send(kept.file, options)).upload;
    else lost.push(name);
  }
  return lost;
}

export class LostUploads extends Error {
  constructor(names) {
    super("The image you searched with is no longer on the server: drop it again.");
    this.names = names;
  }
}

// `call()` once more where it failed for an upload that had expired. Raises LostUploads for those without a file.
export async function renewing(refs, call, options) {
  try {
    return await call();
  } catch (error) {
    const names = refs.filter((ref) => "upload" in ref).map((ref) => ref.upload);
    if (![404, 410].includes(error.status) || !names.length) throw error;
    const lost = await renew(names, options);
    if (lost.length) throw new LostUploads(lost);
    return call();
  }
}
