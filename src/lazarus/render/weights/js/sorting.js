/* The order of the table: by a heading that is chosen, up or down, or as the tensors are in the model. */

const SHOWN = ["relative_change", "cosine_similarity", "max_abs_change", "share_changed", ...(Object.keys(data.spectra).length ? ["adapter_rank", "effective_rank", "rank_90"] : [])];

class Sorting {
  /** `change(order)` is called with the rows in their order. */
  constructor(change) {
    this.change = change;
    this.found = [];
    this.key = null;
    this.down = true;
    this.heads = [this.head(null, "Tensor"), ...SHOWN.map((name) => this.head(name, data.headings[name])), element("th", { textContent: "Shape", className: "text", attributes: { scope: "col" } })];
  }

  head(key, text) {
    const button = element("button", { type: "button", textContent: text });
    const cell = element("th", { attributes: { scope: "col" } }, button);
    cell.dataset.key = key ?? "";
    button.addEventListener("click", () => {
      this.down = this.key === key ? !this.down : true;
      this.key = key;
      this.apply();
    });
    return cell;
  }

  /** Sort by a number, the largest first, or as in the model (null), and then `work`. */
  by(key, work) {
    this.key = key;
    this.down = true;
    work();
  }

  setFound(found) {
    this.found = found;
    this.apply();
  }

  apply() {
    this.heads.forEach((cell) => {
      const isKey = cell.dataset.key === (this.key ?? "") && cell.dataset.key !== undefined;
      if (!isKey) cell.removeAttribute("aria-sort");
      else cell.setAttribute("aria-sort", (this.key === null) === this.down ? "ascending" : "descending");
    });
    this.change(this.ordered());
  }

  /** Without a number a tensor comes last, whichever way. */
  ordered() {
    if (this.key === null) return this.down ? this.found : [...this.found].reverse();
    const value = new Map(this.found.map((i) => [i, numberOf(this.key, i)]));
    const sign = this.down ? 1 : -1;
    return [...this.found].sort((a, b) => {
      const [one, other] = [value.get(a), value.get(b)];
      if (absent(one) || absent(other)) return absent(one) - absent(other) || a - b;
      return sign * (other - one) || a - b;
    });
  }
}
