// ---- which metric is plotted ----

function showMetric(section, metric) {
  for (const plot of section.querySelectorAll(".plot")) plot.hidden = plot.dataset.metric !== metric;
}

const switches = [...document.querySelectorAll(".figures .switch")];
for (const one of switches) {
  one.hidden = false;
  one.addEventListener("change", (event) => {
    const metric = event.target.value;
    for (const other of switches) {
      const same = other.querySelector(`input[value="${metric}"]`);
      if (!same) continue; // this table has no such metric, and goes on showing what it has
      same.checked = true;
      showMetric(other.closest("section"), metric);
    }
  });
  // a browser that restores a form after a reload restores the choice alone
  showMetric(one.closest("section"), one.querySelector("input:checked").value);
}

// ---- sorting ----

// A row moves with what belongs to it: its published numbers, and its seeds.
function blocks(body) {
  const found = [];
  for (const line of body.rows) {
    if (line.classList.contains("row")) found.push([line]);
    else if (found.length && !line.classList.contains("group")) found[found.length - 1].push(line);
  }
  return found;
}

function compare(a, b, column, direction) {
  const [one, other] = [a, b].map((block) => block[0].cells[column].dataset.key);
  if (!one || !other) return one ? -1 : other ? 1 : 0; // what has no number comes last either way
  return direction * (column ? Number(one) - Number(other) : one.localeCompare(other, undefined, { numeric: true }));
}

function sort(table, original, column, direction) {
  for (const [body, order] of original) {
    const sorted = direction ? order.toSorted((a, b) => compare(a, b, column, direction)) : order;
    body.append(...sorted.flat());
  }
  const heads = table.querySelectorAll(".sorting th");
  heads.forEach((head) => head.removeAttribute("aria-sort"));
  if (direction) heads[column].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  const name = heads[column].title || heads[column].textContent;
  const says = direction ? `Sorted by ${name}, ${direction > 0 ? "smallest" : "largest"} first` : "In the order of the study";
  table.closest("section").querySelector(".sorted").textContent = says;
}

for (const table of document.querySelectorAll(".results")) {
  const original = [...table.tBodies].map((body) => [body, blocks(body)]);
  table.querySelectorAll(".sorting th").forEach((head, column) => {
    const button = el("button", "", head.textContent);
    button.type = "button";
    const first = head.dataset.up === "true" ? -1 : 1; // the best comes first
    button.addEventListener("click", () => {
      const now = { ascending: 1, descending: -1 }[head.getAttribute("aria-sort")] ?? 0;
      sort(table, original, column, now === 0 ? first : now === first ? -first : 0);
    });
    head.replaceChildren(button);
  });
}

// ---- commands to copy ----

function copied(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  return Promise.reject(new Error("this browser does not let a page copy"));
}

for (const command of document.querySelectorAll(".command")) {
  const button = el("button", "copy", "Copy");
  button.type = "button";
  button.setAttribute("aria-live", "polite");
  const text = command.querySelector("pre");
  button.addEventListener("click", async () => {
    try {
      await copied(text.textContent);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Selected";
    }
    setTimeout(() => (button.textContent = "Copy"), 2000);
  });
  command.append(button);
}

// ---- a link to a row opens it ----

function openLinked() {
  const row = location.hash && document.getElementById(`${location.hash.slice(1)}-more`);
  if (row) row.open = true;
}
addEventListener("hashchange", openLinked);
openLinked();
