// Tables that are sorted by a click on a heading, and filtered by a word. Without this script the page is complete.
"use strict";
for (const box of document.querySelectorAll(".interactive")) {
  const table = box.querySelector("table"), body = table && table.tBodies[0];
  if (!body || body.rows.length < 2) continue;
  const number = (text) => { const n = parseFloat(text.replace(/[,~=<≤>\s]/g, "").replace("−", "-").replace("∞", "Infinity")); return Number.isNaN(n) ? null : n; };
  for (const heading of table.tHead ? table.tHead.rows[0].cells : []) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      const up = heading.getAttribute("aria-sort") !== "ascending", column = heading.cellIndex;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...body.rows], key = (row) => row.cells[column].textContent.trim();
      const numeric = rows.some((row) => number(key(row)) !== null);
      rows.sort((a, b) => {
        if (!numeric) return key(a).localeCompare(key(b)) * (up ? 1 : -1);
        const x = number(key(a)), y = number(key(b));
        if (x === null || y === null) return (x === null) - (y === null);  // what is no number comes last
        return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
      });
      body.append(...rows);
    });
  }
  const label = document.createElement("label"), input = document.createElement("input");
  input.type = "search";
  label.append(`Show rows of ${box.dataset.label} that contain `, input);
  input.addEventListener("input", () => {
    const word = input.value.toLowerCase();
    for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(word);
  });
  box.before(label);
}
