/* One curve a group of prompts, told apart by colour, dash and marker. */

function groupTraces(log) {
  const colours = palette();
  return data.groups.map((curve, i) => ({
    x: data.series.layers,
    y: curve.divergence.map((value) => (log && !(value > 0) ? null : value)),
    name: `${plainText(curve.group)} (${counted(curve.n_prompts, "prompt")})`,
    mode: "lines+markers",
    line: { color: colours.groups[i], dash: DASHES[i], width: 2 },
    marker: { symbol: MARKERS[i], size: 8, color: colours.groups[i] },
    customdata: curve.divergence.map((value) => formatted(value)),
    hovertemplate: "<b>%{customdata}</b>",
  }));
}

/** The library reads some markup in names: a group's name is text. */
function plainText(text) {
  const safe = oneLine(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  return safe.length > 60 ? `${safe.slice(0, 60)}…` : safe;
}

function startGroups() {
  let log = false;
  const values = data.groups.flatMap((curve) => curve.divergence);
  const none = !positive(values).length;
  if (none) disableLog("groups");
  const redraw = plotWhenNear("groups-plot", () => {
    const layout = layoutOf(data.series.layers, "Divergence", log);
    if (NARROW.matches) layout.legend.entrywidth = 1;
    if (!log) layout.yaxis.rangemode = "tozero";
    if (none) layout.yaxis.range = [-0.02, 1];
    document.getElementById("groups-plot-note").textContent =
      log && values.includes(0) ? "Exact zeros have no place on a log scale and are left out." : "";
    return { traces: groupTraces(log), layout };
  });
  scaleSwitch("groups", (chosen) => {
    log = chosen;
    redraw();
  });
}
