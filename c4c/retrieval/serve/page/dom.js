// Small helpers: elements without markup from strings, and times in words.

export const $ = (id) => document.getElementById(id);

/** An element with properties (attributes where the element has no such property) and children. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

/** 75.4 -> "1:15", 3723 -> "1:02:03"; with tenths where a video is short. */
export function clock(seconds, tenths = false) {
  const all = Math.max(0, tenths ? Math.round(seconds * 10) / 10 : Math.round(seconds));
  const whole = Math.floor(all);
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const last = String(rest).padStart(2, "0") + (tenths ? "." + Math.round((all - whole) * 10) : "");
  return hours ? `${hours}:${String(minutes).padStart(2, "0")}:${last}` : `${minutes}:${last}`;
}

export const range = (segment) => {
  const tenths = segment.end - segment.start < 2;
  return `${clock(segment.start, tenths)} – ${clock(segment.end, tenths)}`;
};

export const count = (n, what) => `${n.toLocaleString("en")} ${what}${n === 1 ? "" : "s"}`;
