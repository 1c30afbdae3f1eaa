/* A map of components by layers, and a table of all tensors, that always speak of the same ones. */

const CHANGES = { columns: data.layers, axis: "Layer", value: "relative change", zero: "exactly 0", missing: "no number", picksCell: true, fitsLabels: true };

/** The tensors as columns; a number that there is none of is NaN. */
const tensors = {
  ...data.tensors,
  count: data.tensors.layer.length,
  values: Object.fromEntries(Object.entries(data.tensors.columns).map(([name, column]) => [name, matrixOf(column).values])),
};

const MOST_OUTSIDE = 12;

const componentOf = (i) => tensors.components[tensors.component[i]];
const placeOf = (i) => (tensors.layer[i] === null ? componentOf(i) : `layer ${tensors.layer[i]} ${componentOf(i)}`);
const nameOf = (i) => tensors.names[tensors.name[i]].join(`.${tensors.layer[i]}.`);
const shapeOf = (i) => tensors.kinds[tensors.kind[i]][0];
const isFlagged = (i) => tensors.values.relative_change[i] > data.threshold;

/** A tensor's number by its name in the glossary, of itself or of its spectrum. */
function numberOf(name, i) {
  if (tensors.values[name]) return tensors.values[name][i];
  return data.spectra[i] ? data.spectra[i][name] : null;
}

class Tensors {
  constructor() {
    this.root = document.getElementById("tensors-explorer");
    this.parts = Object.fromEntries([...this.root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
    this.texts = Array.from({ length: tensors.count }, (_, i) => `${placeOf(i)} ${nameOf(i)} ${shapeOf(i)}`.toLowerCase());
    this.sorting = new Sorting((order) => this.table.setOrder(order));
    this.table = new PagedTable(this.parts.table, this.parts.pager, {
      caption: "Each tensor; choose a heading to sort by it",
      head: this.sorting.heads,
      cells: (i) => this.cellsOf(i),
    });
    this.startMap();
    this.parts.search.addEventListener("input", () => this.apply());
    this.parts.sort.addEventListener("change", () => this.sorting.by(this.parts.sort.value === "worst" ? "relative_change" : null, () => this.apply()));
    this.apply();
    this.pickFirst();
  }

  startMap() {
    if (!data.map || !this.parts.heat) return;
    this.matrix = matrixOf(data.map);
    this.rowOf = new Map(data.components.map((name, row) => [name, row]));
    this.columnOf = new Map(data.layers.map((layer, column) => [layer, column]));
    this.at = new Map();
    tensors.layer.forEach((layer, i) => layer !== null && this.at.set(`${this.rowOf.get(componentOf(i))} ${this.columnOf.get(layer)}`, i));
    this.map = new Heatmap(this.parts, { show: (...at) => this.show(...at), leave: () => this.leave(), pick: (...at) => this.pick(...at) }, CHANGES);
    this.hint = this.parts.readout.firstElementChild;
    this.showOutside();
    this.map.setMatrix(this.matrix, (row) => oneLine(data.components[row].slice(0, 120)));
    this.parts.scale.addEventListener("change", () => {
      this.map.log = this.parts.scale.value === "log";
      this.map.rescale();
      this.map.draw();
    });
    this.parts.tall.addEventListener("change", () => {
      this.map.tall = this.parts.tall.checked;
      this.map.draw();
    });
  }

  /** The tensors outside the layers, which have no cell. */
  showOutside() {
    const change = (i) => tensors.values.relative_change[i] || 0;
    const all = tensors.layer.map((_, i) => i).filter((i) => tensors.layer[i] === null);
    const kept = [...all].sort((a, b) => change(b) - change(a) || a - b).slice(0, MOST_OUTSIDE).sort((a, b) => a - b);
    const most = Math.max(0, ...kept.map(change));
    const rows = kept.map((i) => {
      const button = element("button", { type: "button", textContent: oneLine(placeOf(i).slice(0, 60)), title: visible(nameOf(i)) });
      button.addEventListener("click", () => this.choose(i));
      return barRow(button, tensors.values.relative_change[i], most, data.formats.relative_change);
    });
    const left = all.length > kept.length ? `, the ${kept.length} most changed of ${all.length.toLocaleString("en")}` : "";
    this.parts.outside.replaceChildren(element("caption", { textContent: `Outside the layers${left}` }), element("tbody", {}, ...rows));
    this.parts.outside.hidden = !kept.length;
  }

  cellsOf(i) {
    const button = element("button", { type: "button", textContent: oneLine(placeOf(i).slice(0, 120)), title: visible(nameOf(i)) });
    button.addEventListener("click", () => this.choose(i));
    const first = element("th", { attributes: { scope: "row" } }, this.map ? button : element("span", { textContent: button.textContent }));
    const numbers = SHOWN.map((name) => numberCell(numberOf(name, i), data.formats[name] || ".0f"));
    if (isFlagged(i)) [first, ...numbers].forEach((cell) => cell.classList.add("flagged"));
    return [first, ...numbers, element("td", { textContent: shapeOf(i), className: "text" })];
  }

  /** What is searched for, to the map and the table alike. */
  apply() {
    const query = this.parts.search.value.trim().toLowerCase();
    const found = this.texts.map((_, i) => i).filter((i) => !query || this.texts[i].includes(query));
    this.parts.count.textContent = found.length === tensors.count ? counted(found.length, "tensor") : `${counted(found.length, "tensor")} of ${tensors.count.toLocaleString("en")}`;
    if (this.map) this.map.setOrder(this.rows(found, query));
    this.sorting.setFound(found);
  }

  rows(found, query) {
    const names = query ? new Set(found.filter((i) => tensors.layer[i] !== null).map(componentOf)) : null;
    const rows = data.components.map((_, row) => row).filter((row) => !names || names.has(data.components[row]));
    if (this.parts.sort.value !== "worst") return rows;
    const most = data.components.map((_, row) => largest(this.matrix, row));
    return rows.sort((a, b) => (most[b] > most[a] ? 1 : most[b] < most[a] ? -1 : a - b));
  }

  where(row, column) {
    return `layer ${data.layers[column]} ${oneLine(data.components[row].slice(0, 120))}`;
  }

  show(row, column, byKey) {
    const value = this.matrix.at(row, column);
    const said = Number.isNaN(value) && !this.at.has(`${row} ${column}`) ? "no such tensor" : formatted(value);
    this.parts.readout.replaceChildren(`${this.where(row, column)}: `, element("b", { textContent: said }));
    if (byKey) this.parts.live.textContent = `${this.where(row, column)}: ${said}.`;
  }

  leave() {
    this.parts.readout.replaceChildren(this.hint);
  }

  /** A cell of the map. */
  pick(row, column, tell = true) {
    const i = this.at.get(`${row} ${column}`);
    const told = i === undefined ? [element("h4", { textContent: this.where(row, column) }), element("p", { className: "meta", textContent: Number.isNaN(this.matrix.at(row, column)) ? "There is no such tensor." : "The page has no room for more of this tensor. The result saved as .json has it." })] : tensorTold(i);
    this.parts.detail.replaceChildren(...told, changesOf(this.matrix, row, column));
    this.parts.detail.scrollTop = 0;
    if (tell) this.parts.live.textContent = `${this.where(row, column)} is shown.`;
  }

  /** A row of the table. */
  choose(i) {
    const [row, column] = [this.rowOf.get(componentOf(i)), this.columnOf.get(tensors.layer[i])];
    const isInMap = row !== undefined && column !== undefined;
    this.map.mark(isInMap ? row : -1, column);
    if (isInMap) return this.pick(row, column);
    this.parts.detail.replaceChildren(...tensorTold(i));
    this.parts.live.textContent = `${oneLine(placeOf(i))} is shown.`;
    return undefined;
  }

  /** At first the most changed tensor. */
  pickFirst() {
    if (!this.map) return;
    const values = this.matrix.values;
    const most = values.reduce((best, value, k) => (value > values[best] || Number.isNaN(values[best]) ? k : best), 0);
    const [row, column] = [Math.floor(most / this.matrix.columns), most % this.matrix.columns];
    this.map.mark(row, column);
    this.pick(row, column, false);
  }
}
