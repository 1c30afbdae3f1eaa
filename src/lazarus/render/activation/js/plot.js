/* What all plots have in common, and the library that draws them. */

/** The plotting library: inert text until it is needed. Its hash is in the page's policy. */
function plotly() {
  if (!window.Plotly) {
    const script = document.createElement("script");
    script.textContent = document.getElementById("library").textContent;
    document.head.append(script);
  }
  return window.Plotly;
}

const CONFIG = { displayModeBar: false, responsive: true };

/* Where a finger points, dragging scrolls the page. */
const COARSE = window.matchMedia("(pointer: coarse)");
const NARROW = window.matchMedia("(max-width: 40rem)");

/** The layout of a plot over layers. */
function layoutOf(layers, title, log) {
  const colours = palette();
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: colours.quiet };
  const axis = { gridcolor: colours.grid, linecolor: colours.quiet, zeroline: false, ticks: "outside", tickcolor: colours.grid, automargin: true };
  const step = Math.max(1, Math.ceil(layers.length / 16));
  return {
    font,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 56, r: 12, t: 8, b: 44 },
    hovermode: "x unified",
    hoverdistance: -1,
    dragmode: COARSE.matches ? false : "zoom",
    hoverlabel: { bgcolor: colours.sheet, bordercolor: colours.quiet, font: { ...font, color: colours.ink } },
    showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font, ...(NARROW.matches ? { entrywidth: 0.5, entrywidthmode: "fraction" } : {}) },
    xaxis: { ...axis, title: { text: "Layer", standoff: 8 }, tickmode: "linear", tick0: layers[0], dtick: step, range: [layers[0] - 0.6, layers[layers.length - 1] + 0.6], showgrid: false, spikecolor: colours.quiet, spikethickness: 1, unifiedhovertitle: { text: "Layer %{x}" } },
    yaxis: { ...axis, title: { text: title, standoff: 8 }, type: log ? "log" : "linear", exponentformat: "power" },
  };
}

/** Draw a plot when it is near, and again when the theme or its scale changes. */
function plotWhenNear(id, make) {
  const target = document.getElementById(id);
  if (!target) return () => {};
  let drawn = false;
  const draw = () => {
    const { traces, layout } = make();
    plotly().react(target, traces, layout, CONFIG);
    target.dataset.drawn = "true";
    drawn = true;
  };
  whenNear(target, draw);
  onTheme(() => drawn && draw());
  return () => drawn && draw();
}

/** The linear and log switch of a plot; calls back with whether it is log. */
function scaleSwitch(name, change) {
  const inputs = document.querySelectorAll(`[data-scale="${name}"] input`);
  inputs.forEach((input) => input.addEventListener("change", () => change(input.value === "log")));
}

/** A log scale has nothing to show where no value is above 0. */
function disableLog(name) {
  document.querySelectorAll(`[data-scale="${name}"] input[value="log"]`).forEach((input) => {
    input.disabled = true;
  });
}
