/* What each block's own weights change. */

function startLocal() {
  const { layers, local } = data.series;
  plotWhenNear("local", () => {
    const colours = palette();
    const most = Math.max(...local.filter(present));
    const layout = layoutOf(layers, "Local change", false);
    layout.yaxis.range = [0, most > 0 ? most * 1.08 : 1];
    layout.showlegend = false;
    layout.bargap = 0.25;
    const trace = {
      type: "bar", x: layers, y: local, name: "local change", width: layers.length === 1 ? 0.4 : undefined,
      marker: { color: colours.local, line: { color: local.map((v) => (v === most ? colours.ink : colours.local)), width: local.map((v) => (v > 0 ? 1.5 : 0)) } },
      customdata: local.map((v) => (v === 0 ? "exactly 0" : formatted(v, ".6f"))), hovertemplate: "<b>%{customdata}</b>",
    };
    return { traces: [trace], layout };
  });
}
