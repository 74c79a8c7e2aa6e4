// The player: plays a segment from its time, and shows the others of its video as a timeline.

import * as api from "./api.js";
import { $, clock, make, range } from "./dom.js";

const dialog = $("player");
const video = $("video");
const MOST_BUTTONS = 2000; // of a timeline
let asked = null; // the id of the segment that is to be played, whether it can be or not
let current = null; // {segment: {id, start, end}, video_id, offset}
let timeline = { of: null, segments: [] };
let request = null;
let waiting = 0; // a step that was asked for while the segments were not known yet
let stopAt = null; // seconds of the file at which the segment ends
let callbacks = { onClose() {}, onMove() {}, onSimilar() {} };

export const isOpen = () => dialog.open;
export const segment = () => current?.segment.id ?? null;

export function start(words) {
  callbacks = words;
}

/** Play a segment. `name`: of its video, if the page knows it. */
export async function open(id, name = "") {
  request?.abort();
  request = new AbortController();
  const { signal } = request;
  asked = id;
  current = null;
  stopAt = null;
  waiting = 0;
  if (name || !dialog.open) $("player-title").textContent = name || "A moment";
  if (!dialog.open) {
    $("player-time").textContent = "";
    $("player-ends").hidden = true;
    dialog.showModal();
  }
  video.pause(); // the one before would be heard on, and could not be stopped
  $("similar").disabled = true;
  message("Loading …");
  video.hidden = true;
  try {
    await load(id, false, signal);
  } catch (error) {
    if (error.name !== "AbortError") fail(error.message);
  }
}

export function close() {
  request?.abort();
  video.pause();
  video.removeAttribute("src");
  video.load();
  asked = current = null;
  timeline = { of: null, segments: [] };
  $("timeline").replaceChildren();
  if (dialog.open) dialog.close();
}

async function load(id, asClip, signal) {
  const slow = setTimeout(() => message("Preparing this moment for your browser …"), 700);
  let playable;
  try {
    playable = await api.play(id, asClip, signal);
  } finally {
    clearTimeout(slow);
  }
  const { offset } = playable;
  current = { segment: playable, video_id: playable.video_id, offset, isClip: playable.kind === "clip" };
  $("player-title").textContent = playable.video;
  const cut = playable.until < playable.end ? `, up to ${clock(playable.until)} here` : "";
  $("player-time").textContent = `${range(playable)} of ${clock(playable.duration)}${cut}`;
  $("player-end").textContent = clock(playable.duration);
  $("player-ends").hidden = false;
  $("similar").disabled = false;
  stopAt = playable.end - offset;
  const from = Math.max(0, playable.start - offset);
  video.setAttribute("aria-label", playable.video);
  video.src = `${playable.url}#t=${from.toFixed(3)}`;
  video.hidden = false;
  video.onloadedmetadata = () => {
    if (Math.abs(video.currentTime - from) > 0.05) video.currentTime = from;
    message("");
    video.play().catch(() => {}); // a browser may want a click first
  };
  video.onerror = () => {
    if (signal.aborted || !video.getAttribute("src")) return;
    if (current?.isClip) return fail("Your browser cannot play this video.");
    load(id, true, signal).catch((error) => error.name !== "AbortError" && fail(error.message));
  };
  await showTimeline(playable, signal);
}

// the segment is what was found: stop once at its end, and let the user go on
video.addEventListener("timeupdate", () => {
  if (stopAt !== null && video.currentTime >= stopAt) {
    stopAt = null;
    video.pause();
  }
});
video.addEventListener("seeking", () => {
  if (stopAt !== null && Math.abs(video.currentTime - stopAt) > 0.3 && current && Math.abs(video.currentTime - Math.max(0, current.segment.start - current.offset)) > 0.3) stopAt = null;
});

function message(text) {
  $("player-message").textContent = text;
  $("player-message").hidden = !text;
}

function fail(text) {
  video.hidden = true;
  video.pause();
  video.removeAttribute("src");
  video.load();
  if (!timeline.segments.length) $("previous").disabled = $("next").disabled = true;
  message(text);
}

async function showTimeline(playable, signal) {
  if (timeline.of !== playable.video_id) {
    const { segments } = await api.segments(playable.video_id, signal);
    timeline = { of: playable.video_id, segments };
    const shown = segments.slice(0, MOST_BUTTONS);
    $("timeline").replaceChildren(
      ...shown.map((one, place) => {
        const width = (place + 1 < segments.length ? segments[place + 1].start : one.end) - one.start;
        const button = make("button", { type: "button", role: "option", className: "moment", title: range(one), tabIndex: -1, "aria-label": range(one) });
        button.style.flexGrow = Math.max(width, 0.1);
        button.dataset.id = one.id;
        button.addEventListener("click", () => go(one.id));
        return button;
      }),
    );
  }
  const place = at();
  const focused = $("timeline").contains(document.activeElement);
  [...$("timeline").children].forEach((button, number) => {
    const here = number === place;
    button.setAttribute("aria-selected", here);
    button.tabIndex = here ? 0 : -1;
    if (here) toMiddle(button);
    if (here && focused) button.focus({ preventScroll: true });
  });
  $("previous").disabled = place <= 0;
  $("next").disabled = place < 0 || place >= timeline.segments.length - 1;
  const by = waiting;
  waiting = 0;
  if (by) step(by);
}

/** Scroll the timeline alone: scrollIntoView moves the dialog too, and its head out of a low window. */
function toMiddle(button) {
  const [inner, outer] = [button, $("timeline")].map((one) => one.getBoundingClientRect());
  $("timeline").scrollLeft += inner.left + inner.width / 2 - outer.left - outer.width / 2;
}

const at = () => timeline.segments.findIndex((one) => one.id === asked);

function go(id) {
  if (id) callbacks.onMove(id);
}

function step(by) {
  const place = at();
  if (place < 0) waiting = by; // until the segments are known
  else go(timeline.segments[place + by]?.id);
}

dialog.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const arrows = document.activeElement !== video; // there, arrows seek
  if (arrows && event.key === "ArrowLeft") step(-1);
  else if (arrows && event.key === "ArrowRight") step(1);
  else if (event.key === "s" && current) callbacks.onSimilar(current.segment);
  else return;
  event.preventDefault();
});
dialog.addEventListener("cancel", (event) => {
  event.preventDefault();
  callbacks.onClose();
});
dialog.addEventListener("click", (event) => {
  if (event.target === dialog) callbacks.onClose(); // beside it
});
$("close").addEventListener("click", () => callbacks.onClose());
$("previous").addEventListener("click", () => step(-1));
$("next").addEventListener("click", () => step(1));
$("similar").addEventListener("click", () => current && callbacks.onSimilar(current.segment));
