/* One tensor, whole: what it is, its numbers, the singular values of its update. */

const OF_TENSOR = ["relative_change", "cosine_similarity", "max_abs_change", "share_changed", "change_norm", "base_norm"];
const OF_SPECTRUM = ["adapter_rank", "effective_rank", "stable_rank", "rank_90", "spectral_norm", "rounding_norm", "share_computed"];

function tensorTold(i) {
  const [shape, base, finetuned] = tensors.kinds[tensors.kind[i]];
  const types = base === finetuned ? base : `${base} → ${finetuned}`;
  const spectrum = data.spectra[i];
  return [
    element("h4", { textContent: oneLine(placeOf(i).slice(0, 300)) }),
    element("p", { className: "meta name", textContent: visible(nameOf(i)) }),
    element("p", { className: "meta", textContent: `${shape} · ${types}` }),
    factsTable("Its numbers", OF_TENSOR, i),
    ...(spectrum ? [factsTable("Its update, fine-tuned − base", OF_SPECTRUM, i), valuesTable(spectrum)] : []),
  ];
}

function factsTable(caption, names, i) {
  const rows = names.map((name) => element("tr", {}, header(data.headings[name], "row"), numberCell(numberOf(name, i), data.formats[name] || ".0f")));
  return element("table", { className: "told" }, element("caption", { textContent: caption }), element("tbody", {}, ...rows));
}

/** A number with a bar as long as its share of the largest; `name` is a text or an element. */
function barRow(name, value, most, format, chosen = false) {
  const bar = element("i");
  bar.style.width = `${most > 0 && value > 0 ? (100 * value) / most : 0}%`;
  const row = element("tr", {}, element("th", { attributes: { scope: "row" } }, name), numberCell(value, format), element("td", { className: "bar", attributes: { "aria-hidden": "true" } }, bar));
  if (chosen) row.className = "chosen";
  return row;
}

function barTable(caption, heads, rows) {
  const head = element("tr", {}, ...heads.map((text) => header(text)), element("td"));
  return element("table", {}, element("caption", { textContent: caption }), element("thead", {}, head), element("tbody", {}, ...rows));
}

/** The largest singular values. */
function valuesTable(spectrum) {
  const values = spectrum.singular_values;
  const how = spectrum.method === "exact" ? "" : ", by a randomised SVD";
  const caption = `Its ${values.length === 1 ? "singular value" : `${values.length} largest singular values`} of ${spectrum.n_singular_values.toLocaleString("en")}${how}`;
  return barTable(caption, ["σ", "Value"], values.map((value, k) => barRow(String(k + 1), value, values[0], data.formats.spectral_norm)));
}

/** The same component at every layer. */
function changesOf(matrix, row, chosen) {
  const most = largest(matrix, row);
  const rows = data.layers.map((layer, column) => barRow(String(layer), matrix.at(row, column), most, data.formats.relative_change, column === chosen));
  return barTable("The same component at each layer", ["Layer", "Relative change"], rows);
}
