// Requests to the server. Every failure becomes an Error whose message is a sentence for the user.

async function ask(address, options = {}) {
  let answer;
  try {
    answer = await fetch(address, { credentials: "same-origin", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Is it still running?");
  }
  const body = await answer.json().catch(() => null);
  if (answer.ok && body !== null) return body;
  if (answer.status === 401) throw new Error("This server needs its token. Open the address that it printed.");
  throw new Error(sentence(body, answer.status));
}

const sentence = (body, status) =>
  typeof body?.detail === "string" ? body.detail : status === 503 ? "The server is busy. Try again in a moment." : `The server answered with status ${status}.`;

export const info = () => ask("api/info");
export const play = (id, clip, signal) => ask(`api/play/${id}${clip ? "?clip=true" : ""}`, { signal });
export const segments = (video, signal) => ask(`api/segments/${video}`, { signal });

/** Results of a sentence or of a segment. `filters` are those of the page's form. */
export function search({ q, similar, filters, k, signal }) {
  const words = new URLSearchParams({ ...filters, k });
  if (similar) return ask(`api/similar/${similar}?${words}`, { signal });
  words.set("q", q);
  return ask(`api/search?${words}`, { signal });
}

/** Upload a clip or picture and search by it; tells how far it is. Returns {promise, cancel}. */
export function searchByFile({ file, filters, k, onProgress }) {
  const request = new XMLHttpRequest(); // fetch does not tell how far an upload is
  const promise = new Promise((resolve, reject) => {
    const form = new FormData();
    form.append("file", file);
    request.open("POST", `api/search/example?${new URLSearchParams({ ...filters, k })}`);
    request.responseType = "json";
    request.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    request.onload = () =>
      request.status === 200 && request.response ? resolve(request.response) : reject(new Error(sentence(request.response, request.status)));
    request.onerror = () => reject(new Error("The upload broke off. Is the server still running?"));
    request.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    request.send(form);
  });
  return { promise, cancel: () => request.abort() };
}
