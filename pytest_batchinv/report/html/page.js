"use strict";
// Folding, filtering, and links into folded layers. It reads what the table shows, and writes text alone.
for (const table of document.querySelectorAll("table.ops")) {
  const form = document.querySelector(`[data-for="${table.id}"]`);
  const [input, select, told] = ["input", "select", "output"].map((name) => form.querySelector(name));
  const layers = [...table.tBodies];
  let rows = null; // read when the filter is first used

  const fold = (layer, shut) => {
    layer.classList.toggle("shut", shut);
    layer.querySelector("button").setAttribute("aria-expanded", String(!shut));
  };
  const filter = () => {
    rows ??= layers.map((layer) => [...layer.rows].slice(1).map((row) => [row, row.textContent.toLowerCase()]));
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    const searching = words.length > 0 || select.value !== "";
    let shown = 0;
    layers.forEach((layer, i) => {
      let here = 0;
      for (const [row, text] of rows[i]) {
        const fits = (!select.value || row.classList.contains(select.value)) && words.every((word) => text.includes(word));
        row.hidden = !fits;
        here += fits;
      }
      layer.hidden = here === 0;
      shown += here;
    });
    table.classList.toggle("searching", searching);
    told.textContent = searching ? `${shown} of ${rows.flat().length} operators` : "";
  };
  table.addEventListener("click", (event) => {
    const button = event.target.closest(".fold button");
    if (button) fold(button.closest("tbody"), button.getAttribute("aria-expanded") === "true");
  });
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("click", (event) => {
    const how = event.target.dataset.fold;
    if (how) for (const layer of layers) fold(layer, how === "shut");
  });
  // A link to a row that is folded or filtered away shows it first.
  const show = (id) => {
    const row = id && document.getElementById(id);
    if (!row || !table.contains(row)) return;
    if (row.hidden) { input.value = select.value = ""; filter(); }
    fold(row.closest("tbody"), false);
    row.scrollIntoView({ block: "center" });
    row.tabIndex = -1;
    row.focus({ preventScroll: true });
  };
  addEventListener("hashchange", () => show(location.hash.slice(1)));
  show(location.hash.slice(1));
}
const reveal = () => {
  for (let part = document.getElementById(location.hash.slice(1)); part; part = part.parentElement) {
    if (part.tagName === "DETAILS") part.open = true;
  }
};
addEventListener("hashchange", reveal);
reveal();
