/* A heatmap of rows by columns on a canvas that is only as high as what is seen of it. */

const HIGH = 512;
const LOWEST_ROW = 2;
const HIGHEST_ROW = 22;
const TALL_ROW = 20;
const LABEL_ROW = 13;
const LABELS_FROM = 420;
const PAGE_ROWS = 10;
const LEAST_MARK = 5;
const SKEWED = 0.03;

/** Whether half of the values would be one and the same dark colour on a linear scale. */
function skewed(values) {
  const sorted = values.filter((value) => value > 0).sort();
  return sorted.length > 0 && sorted[sorted.length >> 1] < SKEWED * sorted[sorted.length - 1];
}

/** From a value to a step of the colour map; -1 where there is none. */
function colourScale(values, log) {
  let least = Infinity;
  let most = 0;
  values.forEach((value) => {
    if (value > most) most = value;
    if (value > 0 && value < least) least = value;
  });
  const usable = log && most > 0 && least < most;
  const low = usable ? Math.log(least) : 0;
  const span = usable ? Math.log(most) - low : most || 1;
  const place = (value) => (usable ? (value > 0 ? (Math.log(value) - low) / span : 0) : value / span);
  const step = (value) => (Number.isNaN(value) ? -1 : Math.min(STEPS - 1, Math.max(0, Math.round(place(value) * (STEPS - 1)))));
  return { step, least: usable ? least : 0, most };
}

class Heatmap {
  /**
   * `hooks`: show(row, column, byKey) when the cursor moves, leave(), pick(row, column). Rows are those of the matrix.
   * `words`: columns (their names), axis (what they are), value and missing (what the cells are, or are not), zero (the name of
   * exactly 0, where that is no low value but another thing), picksCell (not the row), fitsLabels (no wider than they are).
   */
  constructor(parts, hooks, words) {
    this.parts = parts;
    this.hooks = hooks;
    this.words = { missing: "not measured", ...words };
    this.canvas = parts.heat.querySelector("canvas");
    [this.spacer, this.rowMark, this.picked, this.cursor] = ["spacer", "rowmark", "picked", "cursor"].map((name) => parts.heat.querySelector(`.${name}`));
    this.at = { place: 0, column: 0 };
    this.pickedRow = -1;
    this.pickedColumn = 0;
    this.tall = false;
    this.log = false;
    this.order = [];
    this.listen();
  }

  /** Show another matrix; `label` gives the text of a row. */
  setMatrix(matrix, label) {
    this.matrix = matrix;
    this.label = label;
    this.at = { place: 0, column: 0 };
    this.log = skewed(matrix.values);
    this.parts.scale.value = this.log ? "log" : "linear";
    this.rescale();
  }

  rescale() {
    this.scale = colourScale(this.matrix.values, this.log);
    this.drawKey();
  }

  setOrder(order) {
    this.order = order;
    this.at.place = Math.min(this.at.place, Math.max(0, order.length - 1));
    this.parts.heat.scrollTop = 0;
    this.draw();
  }

  measure() {
    const { heat } = this.parts;
    const count = Math.max(1, this.order.length);
    const fit = Math.min(HIGHEST_ROW, Math.max(LOWEST_ROW, Math.floor(HIGH / count)));
    this.parts.tall.parentElement.hidden = fit >= LABEL_ROW;
    this.rowHeight = this.tall ? Math.max(TALL_ROW, fit) : fit;
    this.height = this.order.length * this.rowHeight;
    this.seen = Math.min(HIGH, Math.max(this.height, this.rowHeight));
    heat.style.height = `${this.seen}px`;
    this.width = heat.clientWidth;
    const labelled = this.rowHeight >= LABEL_ROW;
    this.labels = labelled ? this.labelWidth() : 0;
    this.cell = (this.width - this.labels) / this.matrix.columns;
  }

  labelWidth() {
    const share = this.width < LABELS_FROM ? 0.36 : 0.3;
    const most = Math.min(230, Math.round(this.width * share));
    if (!this.words.fitsLabels) return most;
    const context = this.canvas.getContext("2d");
    context.font = this.font();
    return Math.min(most, 14 + Math.ceil(Math.max(0, ...this.order.map((row) => context.measureText(this.label(row)).width))));
  }

  font() {
    return `${Math.min(12, this.rowHeight - 3)}px ${getComputedStyle(document.body).fontFamily}`;
  }

  fill(value, colours) {
    if (value === 0 && this.words.zero) return colours.zero;
    const step = this.scale.step(value);
    return step < 0 ? colours.missing : RAMP[step];
  }

  draw() {
    this.measure();
    this.spacer.style.height = `${Math.max(0, this.height - this.seen)}px`;
    this.drawCells();
    this.drawAxis();
    this.placeMarks();
  }

  drawCells() {
    const context = this.prepare(this.canvas, this.width, this.seen);
    const top = this.parts.heat.scrollTop;
    const colours = palette();
    const first = Math.floor(top / this.rowHeight);
    const last = Math.min(this.order.length, Math.ceil((top + this.seen) / this.rowHeight));
    const gap = this.rowHeight >= LABEL_ROW && this.cell >= 6 ? 1 : 0;
    for (let place = first; place < last; place += 1) {
      const row = this.order[place];
      const y = place * this.rowHeight - top;
      for (let column = 0; column < this.matrix.columns; column += 1) {
        const left = Math.round(this.labels + column * this.cell);
        const right = Math.round(this.labels + (column + 1) * this.cell);
        context.fillStyle = this.fill(this.matrix.at(row, column), colours);
        context.fillRect(left, y, right - left - gap, this.rowHeight - gap);
        if (gap && context.fillStyle === colours.zero) this.outline(context, left, y, right - left - gap, colours);
      }
      if (this.labels) this.drawLabel(context, this.label(row), y, colours);
    }
  }

  /** The colour of exactly 0 may be that of the page. */
  outline(context, left, y, width, colours) {
    context.strokeStyle = colours.grid;
    context.strokeRect(left + 0.5, y + 0.5, width - 1, this.rowHeight - 2);
  }

  drawLabel(context, text, y, colours) {
    context.save();
    context.beginPath();
    context.rect(0, y, this.labels - 8, this.rowHeight);
    context.clip();
    context.fillStyle = colours.ink;
    context.font = this.font();
    context.textBaseline = "middle";
    context.fillText(text.slice(0, 80), 2, y + this.rowHeight / 2);
    context.restore();
  }

  drawAxis() {
    const context = this.prepare(this.parts.axis, this.width, 34);
    const colours = palette();
    context.fillStyle = colours.quiet;
    context.font = `11px ${getComputedStyle(document.body).fontFamily}`;
    context.textAlign = "center";
    const every = Math.max(1, Math.ceil(26 / this.cell));
    for (let column = 0; column < this.matrix.columns; column += every) {
      context.fillText(String(this.words.columns[column]), this.labels + (column + 0.5) * this.cell, 13);
    }
    context.fillText(this.words.axis, this.labels + (this.width - this.labels) / 2, 29);
  }

  /** Size a canvas for the screen's own pixels and clear it. */
  prepare(canvas, width, height) {
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.clearRect(0, 0, width, height);
    return context;
  }

  drawKey() {
    const ramp = element("span", { className: "ramp" });
    ramp.style.background = RAMP_IMAGE;
    const { least, most } = this.scale;
    const said = (text) => element("span", { textContent: text });
    const nodes = [said(formatted(least)), ramp, said(formatted(most)), said(this.log && least > 0 ? `${this.words.value}, log` : this.words.value)];
    const swatch = (colour, text) => {
      const gap = element("span", { className: "gap" });
      gap.style.background = colour;
      nodes.push(gap, said(text));
    };
    if (this.words.zero && this.matrix.values.includes(0)) swatch(palette().zero, this.words.zero);
    if (this.matrix.values.some(Number.isNaN)) swatch(palette().missing, this.words.missing);
    this.parts.key.replaceChildren(...nodes);
  }

  /** Put the cursor's and the chosen row's outlines where they belong. */
  placeMarks() {
    const chosen = this.order.indexOf(this.pickedRow);
    this.picked.hidden = chosen < 0;
    if (this.words.picksCell) this.put(this.picked, chosen, this.labels + this.pickedColumn * this.cell, this.cell);
    else this.put(this.picked, chosen, 0, this.width);
    this.put(this.rowMark, this.at.place, 0, this.width);
    this.put(this.cursor, this.at.place, this.labels + this.at.column * this.cell, this.cell);
  }

  /** An outline is never so thin that it cannot be seen, and never beyond the last row. */
  put(mark, place, left, width) {
    const high = Math.max(LEAST_MARK, this.rowHeight);
    const wide = Math.max(LEAST_MARK, width);
    const top = Math.max(0, Math.min((place + 0.5) * this.rowHeight - high / 2, this.height - high));
    const start = Math.max(0, Math.min(left + (width - wide) / 2, this.width - wide));
    mark.style.transform = `translate(${start}px, ${top}px)`;
    mark.style.height = `${high}px`;
    mark.style.width = `${wide}px`;
  }

  listen() {
    const { heat } = this.parts;
    heat.addEventListener("pointermove", (event) => this.point(event));
    heat.addEventListener("pointerleave", () => this.leave());
    heat.addEventListener("blur", () => this.leave());
    heat.addEventListener("focus", () => heat.matches(":focus-visible") && this.show(false));
    heat.addEventListener("click", (event) => this.point(event) && this.pick(this.order[this.at.place], this.at.column));
    heat.addEventListener("keydown", (event) => this.key(event));
    heat.addEventListener("scroll", () => requestAnimationFrame(() => this.drawCells()), { passive: true });
    new ResizeObserver(() => this.matrix && heat.clientWidth !== this.width && this.draw()).observe(heat);
    onTheme(() => {
      if (!this.matrix) return;
      this.drawKey();
      this.draw();
    });
  }

  point(event) {
    const bounds = this.parts.heat.getBoundingClientRect();
    const place = Math.floor((event.clientY - bounds.top + this.parts.heat.scrollTop) / this.rowHeight);
    if (place < 0 || place >= this.order.length) return false;
    const column = Math.floor((event.clientX - bounds.left - this.labels) / this.cell);
    this.at = { place, column: Math.min(this.matrix.columns - 1, Math.max(0, column)) };
    this.show(false);
    return true;
  }

  key(event) {
    const moves = { ArrowDown: [1, 0], ArrowUp: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1], PageDown: [PAGE_ROWS, 0], PageUp: [-PAGE_ROWS, 0], Home: [-Infinity, 0], End: [Infinity, 0] };
    const isPick = event.key === "Enter" || event.key === " ";
    if ((!moves[event.key] && !isPick) || !this.order.length || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (isPick) return void this.pick(this.order[this.at.place], this.at.column);
    const [down, right] = moves[event.key];
    const clamp = (value, most) => Math.min(most, Math.max(0, value));
    this.at = { place: clamp(this.at.place + down, this.order.length - 1), column: clamp(this.at.column + right, this.matrix.columns - 1) };
    this.keepInSight();
    this.show(true);
  }

  keepInSight() {
    const { heat } = this.parts;
    const top = this.at.place * this.rowHeight;
    if (top < heat.scrollTop) heat.scrollTop = top;
    const bottom = top + this.rowHeight - heat.clientHeight;
    if (bottom > heat.scrollTop) heat.scrollTop = bottom;
  }

  show(byKey) {
    if (!this.order.length) return;
    this.rowMark.hidden = false;
    this.cursor.hidden = false;
    this.placeMarks();
    this.hooks.show(this.order[this.at.place], this.at.column, byKey);
  }

  leave() {
    this.rowMark.hidden = true;
    this.cursor.hidden = true;
    this.hooks.leave();
  }

  pick(row, column) {
    this.mark(row, column);
    this.hooks.pick(row, column);
  }

  /** Outline what is chosen. */
  mark(row, column = 0) {
    this.pickedRow = row;
    this.pickedColumn = column;
    this.placeMarks();
  }
}
