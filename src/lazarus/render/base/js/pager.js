/* A table of many rows, a page at a time. */

const PAGE = 25;

class PagedTable {
  /** `head` gives the header cells, `cells(row)` the cells of a row. */
  constructor(table, pager, { caption, head, cells }) {
    this.table = table;
    this.cells = cells;
    this.order = [];
    this.page = 0;
    this.body = element("tbody");
    table.replaceChildren(element("caption", { textContent: caption }), element("thead", {}, element("tr", {}, ...head)), this.body);
    this.rows = element("span", { className: "rows", attributes: { role: "status" } });
    const last = () => this.pages() - 1;
    this.buttons = [["First", () => 0], ["Previous", () => this.page - 1], ["Next", () => this.page + 1], ["Last", last]].map(([name, to]) => {
      const button = element("button", { type: "button", textContent: name });
      button.addEventListener("click", () => this.go(to()));
      return button;
    });
    pager.replaceChildren(...this.buttons, this.rows);
  }

  pages() {
    return Math.max(1, Math.ceil(this.order.length / PAGE));
  }

  setOrder(order) {
    this.order = order;
    this.go(0);
  }

  go(page) {
    this.page = Math.min(this.pages() - 1, Math.max(0, page));
    const first = this.page * PAGE;
    const shown = this.order.slice(first, first + PAGE);
    this.body.replaceChildren(...shown.map((row) => element("tr", {}, ...this.cells(row))));
    const [toFirst, previous, next, toLast] = this.buttons;
    this.buttons.forEach((button) => {
      button.hidden = this.pages() === 1;
    });
    toFirst.disabled = previous.disabled = this.page === 0;
    next.disabled = toLast.disabled = this.page === this.pages() - 1;
    const range = `${(first + 1).toLocaleString("en")}–${(first + shown.length).toLocaleString("en")}`;
    this.rows.textContent = shown.length ? `Rows ${range} of ${this.order.length.toLocaleString("en")}` : "No rows";
  }
}
