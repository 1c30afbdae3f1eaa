/* Colours that the colour-blind can tell apart, in both themes. */

const VIRIDIS = [
  "440154", "48186a", "472d7b", "424086", "3b528b", "33638d", "2c728e", "26828e", "21918c",
  "1fa088", "28ae80", "3fbc73", "5ec962", "84d44b", "addc30", "d8e219", "fde725",
].map((hex) => [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16)));

const STEPS = 256;

/** The colour map in 256 steps, straight lines between viridis' own colours. */
const RAMP = Array.from({ length: STEPS }, (_, step) => {
  const place = (step / (STEPS - 1)) * (VIRIDIS.length - 1);
  const left = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const part = place - left;
  const mixed = VIRIDIS[left].map((from, i) => Math.round(from + (VIRIDIS[left + 1][i] - from) * part));
  return `rgb(${mixed.join(",")})`;
});

const RAMP_IMAGE = `linear-gradient(to right, ${RAMP.filter((_, i) => i % 15 === 0).join(",")})`;

/* Okabe and Ito's palette, without the colours that a background swallows. */
const LIGHT = {
  ink: "#1c1b19", quiet: "#5c5851", grid: "#e8e4db", sheet: "#ffffff", missing: "#d9d5cc", zero: "#ffffff",
  main: "#0072B2", band: "rgba(0,114,178,0.18)", flag: "#D55E00", noise: "#009E73", unrelated: "#CC79A7",
  local: "#E69F00",
  groups: ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7a7a00"],
};
const DARK = {
  ink: "#e9e6df", quiet: "#a9a59b", grid: "#2d333b", sheet: "#1b1f25", missing: "#3a4048", zero: "#000000",
  main: "#56B4E9", band: "rgba(86,180,233,0.22)", flag: "#FF9A5C", noise: "#2CC295", unrelated: "#E3A0C5",
  local: "#E69F00",
  groups: ["#56B4E9", "#FF9A5C", "#2CC295", "#E3A0C5", "#E69F00", "#4a93d9", "#ffffff", "#F0E442"],
};
const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "solid", "dash"];
const MARKERS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "triangle-down"];

const systemDark = window.matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : systemDark.matches;
}

const palette = () => (isDark() ? DARK : LIGHT);

const redraws = [];

/** Call this whenever the theme changes. */
const onTheme = (redraw) => redraws.push(redraw);

function startTheme() {
  const button = document.getElementById("theme");
  const show = () => {
    button.textContent = isDark() ? "Light theme" : "Dark theme";
    redraws.forEach((redraw) => redraw());
  };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = isDark() ? "light" : "dark";
    show();
  });
  systemDark.addEventListener("change", show);
  show();
}
