// A clip or picture to search by: chosen, dropped or pasted.

import { $ } from "./dom.js";

let picture = null;

/** Calls `take(file)` for every file that the user gives. */
export function start(take) {
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    const [file] = $("file").files;
    $("file").value = "";
    if (file) take(file);
  });
  let inside = 0;
  const files = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  addEventListener("dragenter", (event) => {
    if (!files(event)) return;
    event.preventDefault();
    inside += 1;
    $("drop").hidden = false;
  });
  addEventListener("dragover", (event) => files(event) && event.preventDefault());
  addEventListener("dragleave", () => {
    inside = Math.max(0, inside - 1);
    if (!inside) $("drop").hidden = true;
  });
  addEventListener("drop", (event) => {
    inside = 0;
    $("drop").hidden = true;
    if (!files(event)) return;
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) take(file);
  });
  addEventListener("paste", (event) => {
    const [file] = event.clipboardData?.files ?? [];
    if (file) take(file);
  });
}

/** Show in the search box what is searched by; null: nothing. */
export function showExample(example, onRemove) {
  const chip = $("example");
  if (picture) URL.revokeObjectURL(picture);
  picture = null;
  chip.replaceChildren();
  chip.hidden = !example;
  $("q").placeholder = example ? "or type" : "Describe a moment";
  if (!example) return;
  if (example.file?.type.startsWith("image/")) {
    picture = URL.createObjectURL(example.file);
    chip.append(image(picture));
  } else if (example.thumbnail) {
    chip.append(image(example.thumbnail));
  }
  const name = document.createElement("span");
  name.className = "chip-name";
  name.dir = "auto";
  name.textContent = example.name;
  const remove = document.createElement("button");
  remove.type = "button";
  remove.className = "chip-remove";
  remove.textContent = "×";
  remove.setAttribute("aria-label", `Stop searching by ${example.name}`);
  remove.addEventListener("click", onRemove);
  chip.append(name, remove);
}

function image(address) {
  const element = document.createElement("img");
  element.src = address;
  element.alt = "";
  element.addEventListener("error", () => element.remove(), { once: true });
  return element;
}
