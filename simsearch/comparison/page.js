// Sorts a table by the column whose heading is pressed; rows without a value stay last.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const column = heading.cellIndex;
    const body = heading.closest("table").tBodies[0];
    const before = heading.getAttribute("aria-sort");
    const ascending = before ? before === "descending" : heading.dataset.first === "ascending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.sort;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      const numeric = Number(x) - Number(y);
      const order = Number.isNaN(numeric) ? x.localeCompare(y, undefined, { numeric: true }) : numeric;
      return ascending ? order : -order;
    };
    for (const row of [...body.rows].sort(compare)) body.append(row);
  });
}
