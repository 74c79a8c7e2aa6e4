// The grid of results: cards, and moving among them by arrows.

import { $, clock, make, range } from "./dom.js";

const list = $("results");
let scale = { best: 1, least: 0 }; // scores that fill the bar and leave it almost empty: of the first results

/** Show results. `from`: how many of them are on the page already. */
export function show(results, from, { onPlay, onSimilar }) {
  if (from === 0) {
    list.replaceChildren();
    scale = { best: results[0]?.score ?? 1, least: results.at(-1)?.score ?? 0 };
  }
  results.slice(from).forEach((result, place) => list.append(card(result, from + place, onPlay, onSimilar)));
}

export const clear = () => list.replaceChildren();
export const cards = () => [...list.querySelectorAll(".card")];
export const focus = (place) => cards()[place]?.focus();

/** How full a score's bar is, 0 to 1. Cosines of different models lie in different ranges, so the best of the results fills it. */
function fullness(score) {
  const { best, least } = scale;
  return best > least ? Math.max(0.04, 0.12 + (0.88 * (score - least)) / (best - least)) : 1;
}

function card(result, place, onPlay, onSimilar) {
  const name = result.video.split("/").at(-1);
  const folder = result.video.slice(0, result.video.length - name.length);
  const picture = make("img", { src: result.thumbnail, alt: "", loading: place < 12 ? "eager" : "lazy", decoding: "async" });
  picture.addEventListener("error", () => picture.classList.add("missing"), { once: true });
  const bar = make("span", { className: "fill" });
  bar.style.inlineSize = `${Math.round(100 * fullness(result.score))}%`;
  const open = make(
    "button",
    { type: "button", className: "card", "aria-label": `${result.video}, ${range(result)}, score ${result.score.toFixed(3)}` },
    make("span", { className: "frame" }, picture, make("span", { className: "badge" }, range(result))),
    make("span", { className: "name", dir: "auto", title: result.video }, make("span", { className: "folder" }, folder), name),
    make("span", { className: "line" }, make("span", { className: "bar" }, bar), make("span", { className: "score" }, result.score.toFixed(3)), make("span", { className: "of" }, `of ${clock(result.duration, result.duration < 2)}`)),
  );
  open.addEventListener("click", () => onPlay(result, open));
  open.addEventListener("keydown", (event) => {
    if (event.key === "s" && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      onSimilar(result);
    }
  });
  const similar = make("button", { type: "button", className: "similar", tabIndex: -1, title: "Similar moments (s)" }, "Similar");
  similar.setAttribute("aria-label", `Moments similar to ${result.video}, ${range(result)}`);
  similar.addEventListener("click", () => onSimilar(result));
  return make("li", {}, open, similar);
}

/** Arrow keys among the cards; up from the first row goes back to the search box. */
export function moveByArrow(event) {
  const all = cards();
  const at = all.indexOf(document.activeElement);
  if (at < 0) return;
  const top = all[0].getBoundingClientRect().top;
  const columns = Math.max(1, all.filter((one) => Math.abs(one.getBoundingClientRect().top - top) < 4).length);
  const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns, Home: -at, End: all.length - 1 - at }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  if (event.key === "ArrowUp" && at < columns) return $("q").focus();
  const to = event.key === "ArrowDown" && at + step >= all.length ? all.length - 1 : at + step;
  if (to >= 0 && to < all.length) {
    all[to].focus({ preventScroll: true });
    all[to].scrollIntoView({ block: "nearest" });
  }
}
