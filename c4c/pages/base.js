"use strict";
// Every text of the data is set as text, never as HTML.
const $ = (id) => document.getElementById(id);

function el(name, kind, text) {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  if (text !== undefined) node.textContent = text;
  return node;
}

// ---- colours ----

const dark = matchMedia("(prefers-color-scheme: dark)");
function remembered(name) {
  try {
    return localStorage.getItem(name);
  } catch {
    return null; // a page from a file may have no storage
  }
}
function showTheme() {
  const now = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  $("theme").textContent = now === "dark" ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", `Use ${now === "dark" ? "light" : "dark"} colours`);
  return now;
}
$("theme").addEventListener("click", () => {
  document.documentElement.dataset.theme = showTheme() === "dark" ? "light" : "dark";
  showTheme();
  try {
    localStorage.setItem("c4c-theme", document.documentElement.dataset.theme);
  } catch {
    // see above
  }
});
dark.addEventListener("change", showTheme);
if (["light", "dark"].includes(remembered("c4c-theme"))) document.documentElement.dataset.theme = remembered("c4c-theme");
showTheme();
$("theme").hidden = false;

// ---- numbers of a chart under the pointer ----

for (const chart of document.querySelectorAll("svg.chart")) {
  const series = JSON.parse(chart.dataset.series);
  const readout = chart.parentElement.querySelector(".readout");
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  const number = (value) => (value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(2) : String(Math.round(value * 1000) / 1000));
  chart.addEventListener("pointermove", (event) => {
    const x = ((event.clientX - chart.getBoundingClientRect().left) / chart.getBoundingClientRect().width) * chart.viewBox.baseVal.width;
    const closest = (points) => points.reduce((a, b) => (Math.abs(b[2] - x) < Math.abs(a[2] - x) ? b : a));
    const place = closest(series.flatMap((one) => one.points));
    for (const [name, value] of [["x1", place[2]], ["x2", place[2]], ["y1", 14], ["y2", 210]]) cursor.setAttribute(name, value);
    chart.append(cursor);
    const values = series
      .map((one) => ({ name: one.name, point: closest(one.points) }))
      .filter((one) => one.point[2] === place[2]) // a line may have no point there
      .map((one) => `${one.name} ${one.point[4] ?? number(one.point[1])}`)
      .reverse();
    readout.textContent = `${chart.dataset.x} ${number(place[0])}: ${values.join(", ")}`;
  });
  chart.addEventListener("pointerleave", () => {
    cursor.remove();
    readout.textContent = "\u00a0";
  });
}
