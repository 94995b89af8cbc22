// Tables of class "sortable": a button in each header sorts; the search field before the table filters.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const key = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent;
  heads.forEach((head, i) => head.querySelector("button").addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    rows.sort((a, b) => sign * key(a, i).localeCompare(key(b, i), "en", { numeric: true }));
    if (rows.some((row) => row.cells[i].dataset.v !== undefined))
      rows.sort((a, b) => sign * ((parseFloat(key(a, i)) || 0) - (parseFloat(key(b, i)) || 0)));
    body.append(...rows);
  }));
  const search = document.getElementById(table.dataset.search), count = document.getElementById(table.dataset.count);
  search.addEventListener("input", () => {
    const words = search.value.toLowerCase().split(/\s+/);
    let matching = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      matching += !row.hidden;
    }
    count.textContent = `${matching} of ${rows.length} shown`;
  });
}
