// Every text of the data is set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20;
const state = { shown: PAGE, list: [] };

function captionNode(name, kind, text) {
  const node = el(name, kind, text);
  node.dir = "auto";
  return node;
}

const score = (value) => (value === null ? "not a number" : value.toFixed(3));
const seconds = (s) => `${s < 100 ? s.toFixed(1) : Math.round(s)} s`;

// ---- pictures ----

function film(index) {
  const video = data.videos[index];
  const box = el("span", "film");
  if (!video.strip) {
    box.append(el("span", "none", "no picture"));
    return box;
  }
  const picture = el("img", video.n > 1 ? "moving" : "");
  picture.alt = "";
  picture.decoding = "async";
  picture.src = video.strip;
  picture.style.width = `${100 * video.n}%`;
  picture.style.setProperty("--middle", Math.floor(video.n / 2) / video.n); // shown where nothing moves
  picture.style.animationDuration = `${0.35 * video.n}s`;
  picture.style.animationTimingFunction = `steps(${video.n})`;
  box.append(picture);
  return box;
}

function enlarge(index) {
  const video = data.videos[index];
  $("large-title").textContent = video.key;
  $("large-film").replaceChildren(film(index));
  const all = video.n === video.seen ? `The ${video.n === 1 ? "frame" : `${video.n} frames`}` : `${video.n} of the ${video.seen} frames`;
  $("large-facts").textContent = `${seconds(video.s)}.${video.strip ? ` ${all} that the model saw${data.clips > 1 ? " in the first clip" : ""}.` : ""}`;
  $("large-captions").replaceChildren(...video.own.map((t) => captionNode("li", "", data.texts[t])));
  $("large").showModal();
}

function videoButton(index, place, value, right, text) {
  const video = data.videos[index];
  const button = el("button", right ? "found truth" : "found");
  button.type = "button";
  button.tabIndex = -1;
  button.append(film(index));
  const under = el("span", "under");
  const mark = el("b", "", right ? `${place} ✓` : place);
  if (right) mark.append(el("span", "word", " correct"));
  under.append(mark);
  if (value !== undefined) under.append(el("span", "score", score(value)));
  const says = data.texts[text ?? video.own[0]] ?? video.key;
  button.append(under, captionNode("span", "says", says));
  button.setAttribute("aria-label", `${place}${right ? ", correct" : ""}: ${video.key}, ${says}`);
  button.addEventListener("click", () => enlarge(index));
  return button;
}

// ---- a query ----

function head(query, title, facts) {
  const top = el("div", "head");
  const rank = el("span", query.rank === 1 ? "rank first" : "rank", `rank ${query.rank}`);
  top.append(rank, title);
  const line = el("p", "facts-line", facts);
  if (query.near !== null) {
    line.append(" ", el("span", "near", "near-duplicate"), " ");
    line.append(captionNode("span", "", `“${data.texts[query.near]}”`));
  }
  return [top, line];
}

function textCard(query) {
  const video = data.videos[query.video];
  const facts = `${video.key}, ${seconds(video.s)}, ${query.words} ${query.words === 1 ? "word" : "words"}`;
  const row = el("div", "tilesrow");
  for (const [place, [index, value]] of query.found.entries()) {
    const right = index === query.video;
    row.append(videoButton(index, String(place + 1), value, right, right ? query.text : undefined));
  }
  if (!query.found.some(([index]) => index === query.video)) {
    const last = el("div", "later");
    last.append(videoButton(query.video, String(query.rank), query.score, true, query.text));
    row.append(last);
  }
  return [...head(query, captionNode("h3", "", data.texts[query.text]), facts), row];
}

function videoCard(query) {
  const video = data.videos[query.video];
  const list = el("ol", "answers");
  const line = (place, text, value, right, after) => {
    const item = el("li", right ? "truth-text" : "");
    if (after) item.classList.add("after");
    const words = captionNode("span", "text", data.texts[text]);
    item.append(el("b", "", right ? `${place} ✓` : `${place}`), words, el("span", "score", score(value)));
    if (right) words.append(el("span", "hidden", " (correct)"));
    list.append(item);
  };
  for (const [place, [text, value, mine]] of query.found.entries()) line(place + 1, text, value, mine, false);
  if (!query.found.some(([, , mine]) => mine)) line(query.rank, query.best[0], query.best[1], true, true);
  const body = el("div", "video-query");
  body.append(videoButton(query.video, "query", undefined, false), list);
  return [...head(query, el("h3", "", video.key), seconds(video.s)), body];
}

function card(query, place) {
  const node = el("li", "card");
  node.tabIndex = place === 0 ? 0 : -1;
  node.append(...(way() === "t2v" ? textCard(query) : videoCard(query)));
  node.setAttribute("aria-posinset", String(place + 1));
  node.setAttribute("aria-setsize", String(state.list.length));
  return node;
}

// ---- which queries ----

const way = () => document.querySelector("input[name=way]:checked").value;
const searched = new Map();

function haystack(query) {
  if (!searched.has(query)) {
    const video = data.videos[query.video];
    const texts = way() === "t2v" ? [query.text] : [...video.own, query.best[0], ...query.found.map(([text]) => text)];
    searched.set(query, [video.key, ...texts.map((t) => data.texts[t])].join("\n").toLowerCase());
  }
  return searched.get(query);
}

function within(bins, choice, value) {
  if (choice === "") return true;
  const [, low, high] = bins[Number(choice)];
  return value >= low && (high === null || value < high);
}

function matches(query) {
  const from = Number($("from").value) || 1;
  const to = Number($("to").value) || Infinity;
  const show = $("show").value;
  if (show !== "all" && query.rank === 1) return false;
  if (show === "near" && query.near === null) return false;
  if (query.rank < from || query.rank > to) return false;
  if (!within(data.durations, $("duration").value, data.videos[query.video].s)) return false;
  if (!within(data.words, $("words").value, query.words)) return false;
  const wanted = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  return wanted.every((word) => haystack(query).includes(word));
}

function update() {
  const all = data[way()];
  state.list = all.filter(matches);
  if ($("order").value === "best") state.list.reverse();
  state.shown = PAGE;
  draw(0);
  const n = state.list.length;
  $("matches").textContent = n ? `${n} of ${all.length} queries` : "No query matches. Widen the filters, or clear the search.";
  for (const note of document.querySelectorAll("[data-way]")) note.hidden = note.dataset.way !== way();
}

function draw(from) {
  const nodes = state.list.slice(from, state.shown).map((query, i) => card(query, from + i));
  if (from) $("cards").append(...nodes);
  else $("cards").replaceChildren(...nodes);
  const left = state.list.length - state.shown;
  $("more").hidden = left <= 0;
  $("more").textContent = `Show ${Math.min(PAGE, left)} more of ${left}`;
}

function more() {
  const from = state.shown;
  state.shown += PAGE;
  draw(from);
  return $("cards").children[from];
}

// ---- keyboard ----

function focusCard(node) {
  for (const other of $("cards").children) other.tabIndex = -1;
  node.tabIndex = 0;
  node.focus();
  node.scrollIntoView({ block: "nearest" });
}

function move(event) {
  const node = event.target.closest(".card");
  if (!node || event.altKey || event.ctrlKey || event.metaKey) return;
  const cards = [...$("cards").children];
  const place = cards.indexOf(node);
  const films = [...node.querySelectorAll(".found")];
  const at = films.indexOf(document.activeElement);
  let target = null;
  if (event.key === "ArrowDown") target = cards[place + 1] ?? ($("more").hidden ? null : more());
  else if (event.key === "ArrowUp") target = cards[place - 1];
  else if (event.key === "Home") target = cards[0];
  else if (event.key === "End") target = cards[cards.length - 1];
  else if (event.key === "ArrowRight") return stop(event, () => films[Math.min(at + 1, films.length - 1)]?.focus());
  else if (event.key === "ArrowLeft") return stop(event, () => (at > 0 ? films[at - 1].focus() : focusCard(node)));
  else if (event.key === "Escape" && at >= 0) return stop(event, () => focusCard(node));
  else if (event.key === "Enter" && at < 0) return stop(event, () => films[0]?.focus());
  if (target) stop(event, () => focusCard(target));
}

function stop(event, act) {
  event.preventDefault();
  act();
}

document.addEventListener("keydown", (event) => {
  const typing = event.target.matches("input, select, textarea");
  if (event.key === "/" && !typing && !$("large").open) stop(event, () => $("search").focus());
  else if (event.key === "Escape" && event.target === $("search")) {
    $("search").value = "";
    update();
  } else if (event.key === "ArrowDown" && event.target === $("search") && $("cards").firstChild) {
    stop(event, () => focusCard($("cards").firstChild));
  }
});
$("cards").addEventListener("keydown", move);
$("more").addEventListener("click", () => focusCard(more()));
$("large").addEventListener("click", (event) => event.target === $("large") && $("large").close());

// ---- motion ----

function setMotion(moving) {
  document.documentElement.dataset.motion = moving ? "moving" : "still";
  $("motion").textContent = moving ? "Pause" : "Play";
  $("motion").setAttribute("aria-label", moving ? "Pause the thumbnails" : "Play the thumbnails");
}
$("motion").addEventListener("click", () => setMotion(document.documentElement.dataset.motion !== "moving"));
setMotion(!matchMedia("(prefers-reduced-motion: reduce)").matches);

// ---- begin ----

for (const [id, bins] of [["duration", data.durations], ["words", data.words]]) {
  bins.forEach(([label], i) => {
    const option = el("option", "", label);
    option.value = String(i);
    $(id).append(option);
  });
}
// a row of a breakdown shows its queries
for (const table of document.querySelectorAll("table[data-control]")) {
  for (const head of table.querySelectorAll("tbody th")) {
    const label = head.textContent;
    const button = el("button", "link", label);
    button.type = "button";
    button.setAttribute("aria-label", `${label}: show the failures`);
    button.addEventListener("click", () => {
      $("controls").reset();
      document.querySelector(`input[name=way][value=${table.dataset.show}]`).checked = true;
      const control = $(table.dataset.control);
      control.value = [...control.options].find((option) => option.textContent === label).value;
      update();
      $("gallery").scrollIntoView();
      control.focus({ preventScroll: true });
    });
    head.replaceChildren(button);
  }
}
if (!data.t2v.some((query) => query.rank > 1)) $("show").value = "all";
$("controls").addEventListener("input", update);
$("controls").addEventListener("submit", (event) => event.preventDefault());
$("controls").hidden = $("status").hidden = false;
update();
