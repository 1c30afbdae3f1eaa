/* The divergence over layers, with what it is held against; or CKA, where no direction can be compared. */

const FAR = 3;
const LONE = 0.08;

const positive = (values) => values.filter((value) => present(value) && value > 0);

/** Where a log axis ends below: a decade under the least value, so that exact zeros have a place. */
const floorOf = (values) => 10 ** (Math.floor(Math.log10(Math.min(...values))) - 0.5);

/** The stretches of layers that have an interval. */
function stretches(low, high) {
  const found = [];
  low.forEach((value, i) => {
    if (absent(value) || absent(high[i])) return;
    const last = found[found.length - 1];
    if (last && last[last.length - 1] === i - 1) last.push(i);
    else found.push([i]);
  });
  return found;
}

/** The interval as polygons, one a stretch; a single layer gets a bar of its own. */
function band(series, least) {
  const x = [];
  const y = [];
  const above = (value) => (least ? Math.max(value, least) : value);
  stretches(series.low, series.high).forEach((stretch) => {
    const places = stretch.length > 1 ? stretch.map((i) => [i, series.layers[i]]) : [-LONE, LONE].map((d) => [stretch[0], series.layers[stretch[0]] + d]);
    const back = [...places].reverse();
    x.push(...places.map((p) => p[1]), ...back.map((p) => p[1]), places[0][1], null);
    y.push(...places.map((p) => above(series.high[p[0]])), ...back.map((p) => above(series.low[p[0]])), above(series.high[places[0][0]]), null);
  });
  return { x, y, name: "95 % interval", mode: "lines", line: { width: 0 }, fill: "toself", fillcolor: palette().band, hoverinfo: "skip" };
}

/** Markers would drown the dashes: only a layer with a gap on either side, which has no line, gets one. */
const loneMarkers = (values) => values.map((_, i) => (absent(values[i - 1]) && absent(values[i + 1]) ? 7 : 0));

function reference(series, name, values, colour, dash) {
  return {
    x: series.layers, y: values, name, mode: "lines+markers", marker: { size: loneMarkers(values), color: colour },
    line: { color: colour, dash, width: 1.6 }, customdata: values.map((v) => formatted(v)),
    hovertemplate: "%{customdata}",
  };
}

/** Exact zeros have no place on a log axis: they stand at its foot. */
function zeros(series, least) {
  const where = series.layers.filter((_, i) => series.divergence[i] === 0);
  return {
    x: where, y: where.map(() => least), name: "exactly 0", mode: "markers", hovertemplate: "0",
    marker: { symbol: "triangle-down-open", size: 9, color: palette().main, line: { width: 1.5 } },
  };
}

function mainTraces(series, log) {
  const colours = palette();
  const texts = series.divergence.map((value, i) => {
    const told = formatted(value);
    return absent(series.low[i]) ? told : `${told} (${formatted(series.low[i])} to ${formatted(series.high[i])})`;
  });
  const flagged = series.layers.map((_, i) => i).filter((i) => series.flagged[i]);
  const drawn = series.divergence.map((value) => (log && !(value > 0) ? null : value));
  return [
    { x: series.layers, y: drawn, name: "divergence", mode: "lines+markers", line: { color: colours.main, width: 2.4 }, marker: { size: 6, color: colours.main }, customdata: texts, hovertemplate: "<b>%{customdata}</b>" },
    { x: flagged.map((i) => series.layers[i]), y: flagged.map((i) => series.divergence[i]), name: `above ${series.threshold}`, mode: "markers", hoverinfo: "skip", marker: { symbol: "diamond", size: 11, color: colours.flag, line: { color: colours.sheet, width: 1.5 } } },
  ];
}

/** What a reader must know of a line that the linear scale leaves out. */
function outOfScale(references, top) {
  const far = references.filter(([, values]) => Math.min(...values.filter(present)) > top);
  return far.map(([name, values]) => {
    const known = values.filter(present);
    const [least, most] = [Math.min(...known), Math.max(...known)].map((value) => formatted(value));
    return `${name} (${least === most ? least : `${least} to ${most}`})`;
  });
}

function curvePlot(series, log) {
  const colours = palette();
  const ends = [...series.divergence, ...series.high].filter(present);
  const most = Math.max(...ends);
  const all = positive([...series.divergence, ...series.low, ...series.noise_floor]);
  const least = log && all.length ? floorOf(all) : 0;
  const threshold = [series.threshold];
  const traces = [
    series.low.some(present) && band(series, least),
    series.unrelated.some(present) && reference(series, "unrelated prompts", series.unrelated.map((v) => (log && !(v > 0) ? null : v)), colours.unrelated, "dot"),
    series.noise_floor.some(present) && reference(series, "noise floor", series.noise_floor.map((v) => (log && !(v > 0) ? null : v)), colours.noise, "dash"),
    { x: [series.layers[0] - 0.6, series.layers[series.layers.length - 1] + 0.6], y: [series.threshold, series.threshold], name: `threshold ${series.threshold}`, mode: "lines", line: { color: colours.flag, dash: "longdashdot", width: 1.2 }, hoverinfo: "skip" },
    ...mainTraces(series, log),
    log && series.divergence.includes(0) && zeros(series, least),
  ].filter((trace) => trace && trace.x.length);
  const layout = layoutOf(series.layers, "Divergence", log);
  const near = [...threshold, ...series.unrelated].filter((v) => present(v) && v <= FAR * most);
  const top = most > 0 ? Math.max(most, ...near) * 1.08 : 1;
  if (log) layout.yaxis.range = [Math.log10(least), Math.log10(Math.max(most, series.threshold, ...series.unrelated.filter(present)) * 1.5)];
  else layout.yaxis.range = [-0.02 * top, top];
  const left = log ? [] : outOfScale([["the threshold", threshold], ["unrelated prompts", series.unrelated]].filter(([, v]) => v.some(present)), top);
  return { traces, layout, left };
}

/** What stands under the curve. */
function curveNote(series, left) {
  const notes = [];
  if (!positive(series.divergence).length) notes.push("The divergence is exactly 0 wherever it was measured, so there is no log scale.");
  if (left.length) notes.push(`Above this scale: ${left.join(", ")}.`);
  if (series.divergence.some(absent)) notes.push("A gap is a layer that could not be measured; the notes say why.");
  return notes.join(" ");
}

function startCurve() {
  const series = data.series;
  let log = false;
  if (!positive(series.divergence).length) disableLog("curve");
  const redraw = plotWhenNear("curve", () => {
    const { traces, layout, left } = curvePlot(series, log);
    document.getElementById("curve-note").textContent = curveNote(series, left);
    return { traces, layout };
  });
  scaleSwitch("curve", (chosen) => {
    log = chosen;
    redraw();
  });
}

function startCka() {
  const { layers, cka } = data.series;
  plotWhenNear("cka", () => {
    const layout = layoutOf(layers, "CKA", false);
    const least = Math.min(0, ...cka.filter(present));
    layout.yaxis.range = [least - 0.03, 1.05];
    layout.showlegend = false;
    const colours = palette();
    const trace = { x: layers, y: cka, name: "CKA", mode: "lines+markers", line: { color: colours.main, width: 2.4 }, marker: { size: 6 }, customdata: cka.map((v) => formatted(v, data.formats.cka)), hovertemplate: "<b>%{customdata}</b>" };
    return { traces: [trace], layout };
  });
}
