/* All that moves on this page: the theme's button, and numbers that show their digits when pointed at. */

startTheme();
document.querySelectorAll("td[data-value]:not([title])").forEach((cell) => {
  if (cell.dataset.value && cell.dataset.value !== cell.textContent) cell.title = cell.dataset.value;
});
document.documentElement.dataset.ready = "true";
