/* What is on the page, and when it is drawn. */

function start() {
  startTheme();
  startDigits();
  new Tensors();
  document.documentElement.dataset.ready = "true";
}

afterPaint(start);
