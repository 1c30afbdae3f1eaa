/* A heatmap, a search, an order, a chosen row and a paged table that always speak of the same rows. */

const MOST_LABEL = 120;

class Explorer {
  /**
   * `source`: what, count, matrix or null, words (those of the heatmap), text(row), name(row), group(row),
   * lead: [[heading, cell(row)]], told(row).
   */
  constructor(id, source) {
    this.root = document.getElementById(`${id}-explorer`);
    this.parts = Object.fromEntries([...this.root.querySelectorAll("[data-part]")].map((part) => [part.dataset.part, part]));
    this.source = source;
    if (source.matrix) this.map = new Heatmap(this.parts, { show: (...at) => this.show(...at), leave: () => this.leave(), pick: (row) => this.pick(row) }, source.words);
    this.table = new PagedTable(this.parts.table, this.parts.pager, this.tableOf(source));
    this.hint = this.parts.readout && this.parts.readout.firstElementChild;
    this.listen();
    this.setSource(source);
  }

  /** Show other rows of the same kind. */
  setSource(source) {
    this.source = source;
    this.texts = Array.from({ length: source.count }, (_, row) => source.text(row).toLowerCase());
    if (this.map) this.map.setMatrix(source.matrix, (row) => oneLine(source.text(row).slice(0, MOST_LABEL)));
    this.apply();
    if (this.map) this.pick(this.worst()[0], false);
  }

  tableOf(source) {
    const { words } = source;
    const columns = source.matrix ? words.columns : [];
    const lead = source.lead.map(([heading]) => header(heading));
    return {
      caption: `Each ${source.what}${source.matrix ? ` and its ${words.value} at each ${words.axis.toLowerCase()}` : ""}, in the order and search above`,
      head: [header(capital(source.what)), ...lead, ...columns.map((column) => header(`${words.axis} ${column}`))],
      cells: (row) => this.cellsOf(row, columns),
    };
  }

  cellsOf(row, columns) {
    const { matrix, lead } = this.source;
    const text = element("th", { attributes: { scope: "row" } }, this.chooser(row));
    return [text, ...lead.map(([, cell]) => cell(row)), ...columns.map((_, column) => numberCell(matrix.at(row, column)))];
  }

  chooser(row) {
    const shown = oneLine(this.source.text(row).slice(0, MOST_LABEL)) || "(empty)";
    if (!this.map) return element("span", { textContent: shown });
    const button = element("button", { type: "button", textContent: shown, dir: "auto" });
    button.addEventListener("click", () => this.pick(row));
    return button;
  }

  listen() {
    const { search, sort, scale, tall } = this.parts;
    search.addEventListener("input", () => this.apply());
    sort.addEventListener("change", () => this.apply());
    if (!this.map) return;
    scale.addEventListener("change", () => {
      this.map.log = scale.value === "log";
      this.map.rescale();
      this.map.draw();
    });
    tall.addEventListener("change", () => {
      this.map.tall = tall.checked;
      this.map.draw();
    });
  }

  /** The rows that are searched for, in the order that is chosen, to the map and the table alike. */
  apply() {
    const query = this.parts.search.value.trim().toLowerCase();
    const rows = this.ordered(this.parts.sort.value).filter((row) => !query || this.texts[row].includes(query));
    this.parts.count.textContent = rows.length === this.source.count ? counted(rows.length, this.source.what) : `${counted(rows.length, this.source.what)} of ${this.source.count.toLocaleString("en")}`;
    if (this.map) this.map.setOrder(rows);
    this.table.setOrder(rows);
  }

  ordered(sort) {
    const given = Array.from({ length: this.source.count }, (_, row) => row);
    if (sort === "worst") return this.worst();
    if (sort !== "group") return given;
    const place = (row) => this.source.group(row) ?? Infinity;
    return given.sort((a, b) => (place(a) === place(b) ? a - b : place(a) - place(b)));
  }

  worst() {
    const { matrix, count } = this.source;
    const most = Array.from({ length: count }, (_, row) => largest(matrix, row));
    return most.map((_, row) => row).sort((a, b) => (most[b] > most[a] ? 1 : most[b] < most[a] ? -1 : a - b));
  }

  show(row, column, byKey) {
    const { matrix, words } = this.source;
    const value = matrix.at(row, column);
    const text = oneLine(this.source.text(row).slice(0, 300));
    const where = `${this.source.name(row)}, ${words.axis.toLowerCase()} ${words.columns[column]}: `;
    this.parts.readout.replaceChildren(where, element("b", { textContent: formatted(value) }), " ", element("bdi", { textContent: text }));
    if (byKey) this.parts.live.textContent = `${where}${formatted(value)}. ${text}`;
  }

  leave() {
    this.parts.readout.replaceChildren(this.hint);
  }

  /** Show a row whole: its text and its numbers. */
  pick(row, tell = true) {
    this.map.mark(row);
    const { detail, live } = this.parts;
    detail.replaceChildren(element("h4", { textContent: this.source.name(row) }), ...this.source.told(row), this.numbers(row));
    detail.scrollTop = 0;
    if (tell) live.textContent = `${this.source.name(row)} is shown.`;
  }

  numbers(row) {
    const { matrix, words } = this.source;
    const most = largest(matrix, row);
    const lines = words.columns.map((name, column) => {
      const value = matrix.at(row, column);
      const bar = element("i");
      bar.style.width = `${most > 0 && value > 0 ? (100 * value) / most : 0}%`;
      return element("tr", {}, header(String(name), "row"), numberCell(value), element("td", { className: "bar", attributes: { "aria-hidden": "true" } }, bar));
    });
    const head = element("tr", {}, header(words.axis), header(capital(words.value)), element("td"));
    return element("table", {}, element("caption", { textContent: `Its ${words.value} at each ${words.axis.toLowerCase()}` }), element("thead", {}, head), element("tbody", {}, ...lines));
  }
}
