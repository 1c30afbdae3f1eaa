/* What is on the page, and when it is drawn. */

function start() {
  startTheme();
  startDigits();
  if (document.getElementById("curve")) startCurve();
  if (document.getElementById("cka")) startCka();
  if (document.getElementById("local")) startLocal();
  if (document.getElementById("groups-plot")) startGroups();
  startPrompts();
  if (data.tokens) startTokens();
  document.documentElement.dataset.ready = "true";
}

afterPaint(start);
