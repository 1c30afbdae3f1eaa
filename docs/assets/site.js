// What the theme leaves unsaid to those who do not see the page: the search has a name, and a table that is
// wider than the page can be reached, and so scrolled, from the keyboard.
document.addEventListener("DOMContentLoaded", () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  new MutationObserver(label).observe(document.querySelector("main"), { childList: true, subtree: true });
  label();

  function label() {
    for (const box of document.querySelectorAll(".md-typeset__scrollwrap:not([tabindex])")) {
      box.setAttribute("tabindex", "0");
      box.setAttribute("role", "region");
      box.setAttribute("aria-label", "Table");
    }
  }
});
