// The page: what is searched for stands in its address (?q=…&path=…&similar=…&play=…), so that links and the back key work.

import * as api from "./api.js";
import * as cards from "./cards.js";
import { $, count } from "./dom.js";
import * as player from "./player.js";
import * as upload from "./upload.js";

const PAGE = 24; // results at a time
const MOST = 500;
const FILTERS = { path: "path", min_duration: "min", max_duration: "max", per_video: "several" }; // {word of the address: field}

let facts = { max_upload_bytes: Infinity, longest_query: 10000 };
let shown = { key: null, results: [], k: PAGE }; // what is on the page
let running = null; // {cancel}: the search under way
let latest = Promise.resolve(); // settled once it has come to an end
let opener = null; // the card whose segment plays
const files = new Map(); // {number: File}: what was searched by in this tab, for the back key
let lastFile = 0;

// ---- the address ----

function state() {
  const words = new URLSearchParams(location.search);
  const filters = Object.fromEntries(Object.keys(FILTERS).filter((name) => words.get(name)).map((name) => [name, words.get(name)]));
  return { q: words.get("q") ?? "", similar: words.get("similar") ?? "", by: history.state?.by ?? 0, filters, play: words.get("play") ?? "" };
}

function go({ q = "", similar = "", by = 0, filters = {}, play = "" }, { replace = false, keep = {} } = {}) {
  const words = new URLSearchParams();
  if (q) words.set("q", q);
  if (similar) words.set("similar", similar);
  for (const name of Object.keys(FILTERS)) if (filters[name]) words.set(name, filters[name]);
  if (play) words.set("play", play);
  const address = words.size ? `?${words}` : location.pathname;
  history[replace ? "replaceState" : "pushState"]({ by, ...keep }, "", address);
  return follow();
}

addEventListener("popstate", () => follow());

/** Bring the page to what its address says. */
async function follow() {
  const wanted = state();
  $("q").value = wanted.q;
  setFilters(wanted.filters);
  const number = Object.keys(wanted.filters).length;
  $("active-filters").textContent = number ? ` · ${number} on` : "";
  document.title = wanted.q ? `${wanted.q} – Video search` : "Video search";
  const { play, ...search } = wanted;
  const key = JSON.stringify(search);
  if (key !== shown.key) latest = find(wanted, key);
  await latest;
  if (play && play !== player.segment()) player.open(play, shown.results.find((one) => one.id === play)?.video);
  else if (!play && player.isOpen()) {
    player.close();
    (opener?.isConnected ? opener : cards.cards()[0])?.focus();
  }
}

// ---- searching ----

async function find(wanted, key) {
  running?.cancel();
  const { q, similar, by } = wanted;
  const isEmpty = !q && !similar && !by;
  document.body.classList.toggle("start", isEmpty);
  $("welcome").hidden = !isEmpty;
  if (!similar || similar !== shown.similar) upload.showExample(null);
  note("");
  $("more").hidden = true;
  shown = { key, results: [], k: PAGE, similar };
  if (isEmpty) {
    cards.clear();
    return say("");
  }
  if (by) {
    const file = files.get(by);
    if (!file) {
      cards.clear();
      return problem("This search was by a file that the page no longer has. Choose it again.");
    }
    upload.showExample({ file, name: file.name || "picture" }, () => go({ filters: wanted.filters }));
  } else if (similar) {
    upload.showExample({ name: "a moment", thumbnail: `thumbnail/${similar}` }, () => go({ filters: wanted.filters }));
  }
  await run(wanted, 0);
}

async function run(wanted, from) {
  const { key, k } = shown;
  const mine = by(wanted, k);
  running = mine;
  document.body.classList.add("busy");
  say("Searching …");
  try {
    const found = await mine.promise;
    if (key !== shown.key || running !== mine) return;
    if (wanted.similar) upload.showExample({ name: found.query, thumbnail: `thumbnail/${wanted.similar}` }, () => go({ filters: wanted.filters }));
    showResults(found, wanted, from);
  } catch (error) {
    if (key !== shown.key || running !== mine) return;
    if (error.name === "AbortError") say("The upload was cancelled.");
    else problem(error.message);
    if (from === 0) {
      cards.clear();
      shown.key = null; // the same search again is a new try
    }
  } finally {
    if (running === mine) {
      running = null;
      $("upload").hidden = true;
      document.body.classList.remove("busy");
    }
  }
}

/** Start the search that the address asks for: {promise, cancel}. */
function by(wanted, k) {
  const { filters } = wanted;
  if (wanted.by) {
    const file = files.get(wanted.by);
    $("upload").hidden = false;
    $("upload-name").textContent = file.name || "picture";
    $("upload-bar").value = 0;
    return api.searchByFile({
      file, filters, k,
      onProgress: (part) => {
        $("upload-bar").value = part;
        if (part >= 1) say("Looking at it …");
      },
    });
  }
  const stop = new AbortController();
  return { promise: api.search({ q: wanted.q, similar: wanted.similar, filters, k, signal: stop.signal }), cancel: () => stop.abort() };
}

function showResults(found, wanted, from) {
  shown.results = found.results;
  cards.show(found.results, from, {
    onPlay: (result, card) => {
      opener = card;
      go({ ...wanted, play: result.id }, { keep: { ours: true } });
    },
    onSimilar: findSimilar,
  });
  if (from) cards.focus(from);
  $("more").hidden = !found.more;
  note(found.note);
  const filtered = Object.keys(wanted.filters).length > 0;
  if (!found.results.length) say(filtered ? "Nothing was found with these filters." : "Nothing was found: the index is empty.");
  else say(`${count(found.results.length, "result")} in ${found.seconds < 0.095 ? Math.max(1, Math.round(found.seconds * 1000)) + " ms" : found.seconds.toFixed(1) + " s"}`);
}

const findSimilar = (segment) => go({ similar: segment.id, filters: state().filters }).then(() => cards.focus(0));

function say(text) {
  $("status").classList.remove("problem");
  $("status").textContent = text;
}

function problem(text) {
  say(text);
  $("status").classList.add("problem");
}

/** A search that is not made: what is on the page is of another one. */
function refuse(text) {
  running?.cancel();
  running = null;
  shown = { key: null, results: [], k: PAGE };
  document.body.classList.remove("busy");
  note("");
  $("more").hidden = true;
  cards.clear();
  problem(text);
}

function note(text) {
  $("note").textContent = text;
  $("note").hidden = !text;
}

// ---- what the user does ----

function filters() {
  return { path: $("path").value.trim(), min_duration: $("min").value, max_duration: $("max").value, per_video: $("several").checked ? "false" : "" };
}

const sameFilters = (one, other) => Object.keys(FILTERS).every((name) => (one[name] ?? "") === (other[name] ?? ""));

function setFilters(wanted) {
  for (const name of ["path", "min_duration", "max_duration"]) $(FILTERS[name]).value = wanted[name] ?? "";
  $("several").checked = wanted.per_video === "false";
}

$("search").addEventListener("submit", (event) => {
  event.preventDefault();
  const q = $("q").value.trim();
  const before = state();
  if (q.length > facts.longest_query) return refuse(`The sentence is too long: ${q.length} characters, and ${facts.longest_query} at most.`);
  if (!q && !before.by && !before.similar) return problem("Type what the video shows.");
  if (!running) shown.key = null; // who asks again means it: the server may be back, and the index may have grown
  const asked = q ? { q } : { by: before.by, similar: before.similar };
  const replace = q === before.q && sameFilters(filters(), before.filters);
  go({ ...asked, filters: filters() }, { replace, keep: replace ? history.state ?? {} : {} }).then(() => document.activeElement === $("q") || cards.focus(0));
});
for (const field of Object.values(FILTERS))
  $(field).addEventListener("change", () => {
    const { q, similar, by: file, filters: before } = state();
    if ((q || similar || file) && !sameFilters(filters(), before)) go({ q, similar, by: file, filters: filters() }); // the focus stays where one types
  });
$("clear-filters").addEventListener("click", () => {
  setFilters({});
  const { q, similar, by: file } = state();
  go({ q, similar, by: file });
});
$("more").addEventListener("click", () => {
  const from = shown.results.length;
  shown.k = Math.min(MOST, shown.k + PAGE);
  run(state(), from);
});
$("cancel-upload").addEventListener("click", () => running?.cancel());

upload.start((file) => {
  if (file.size > facts.max_upload_bytes) return problem(`${file.name} is too large: this server takes up to ${Math.floor(facts.max_upload_bytes / 1e6)} MB.`);
  lastFile += 1;
  files.set(lastFile, file);
  if (files.size > 20) files.delete(files.keys().next().value);
  player.isOpen() && player.close();
  go({ by: lastFile, filters: filters() });
});

player.start({
  onClose: () => (history.state?.ours ? history.back() : go({ ...state(), play: "" }, { replace: true })),
  onMove: (id) => go({ ...state(), play: id }, { replace: true, keep: history.state ?? {} }),
  onSimilar: findSimilar,
});

addEventListener("keydown", (event) => {
  if (player.isOpen() || event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = document.activeElement?.matches("input, textarea, select");
  if (event.key === "/" && !typing) {
    event.preventDefault();
    $("q").focus();
    $("q").select();
  } else if (event.key === "Escape" && running) running.cancel();
  else if (event.key === "Escape" && document.activeElement?.matches(".card")) $("q").focus();
  else if (event.key === "ArrowDown" && document.activeElement === $("q") && cards.cards().length) {
    event.preventDefault();
    cards.focus(0);
  } else if (!typing) cards.moveByArrow(event);
});

api.info().then(
  (found) => {
    facts = found;
    $("size").textContent = `${count(found.segments, "moment")} of ${count(found.videos, "video")}`;
  },
  (error) => problem(error.message),
);
$("filters").open = Object.keys(state().filters).length > 0;
if (state().by) history.replaceState({}, "", location.search || location.pathname); // files do not outlive a reload
follow().then(() => !state().q && !state().play && $("q").focus());
