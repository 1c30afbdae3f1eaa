/* Elements: always from text, never from markup. */

/** An element with properties, attributes (in `attributes`) and children, which may be strings. */
function element(name, properties = {}, ...children) {
  const { attributes = {}, ...rest } = properties;
  const made = Object.assign(document.createElement(name), rest);
  Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
  made.append(...children);
  return made;
}

/** A table's cell that carries its number at full precision. */
function numberCell(value, format) {
  const cell = element("td", { textContent: formatted(value, format) });
  cell.dataset.value = absent(value) ? "" : String(value);
  if (present(value)) cell.title = String(value);
  return cell;
}

const capital = (text) => text[0].toUpperCase() + text.slice(1);

const header = (text, scope = "col") => element("th", { textContent: text, attributes: { scope } });

/** The cells of a table that the server wrote show all their digits when asked, and on hover. */
function startDigits() {
  const cells = [...document.querySelectorAll("#layers-table td[data-value]")];
  const short = cells.map((cell) => cell.textContent);
  const isNumber = (cell) => cell.dataset.value !== "" && Number.isFinite(Number(cell.dataset.value));
  document.querySelectorAll("[data-value]").forEach((item) => {
    if (item.dataset.value !== "" && item.textContent !== item.dataset.value) item.title = item.dataset.value;
  });
  document.getElementById("digits").addEventListener("change", (event) => {
    cells.forEach((cell, i) => {
      if (isNumber(cell)) cell.textContent = event.target.checked ? cell.dataset.value : short[i];
    });
  });
}
