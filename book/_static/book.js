// What the theme leaves undone: the words of a search marked where a result lands, and
// folded solutions opened on paper.
"use strict";
(function () {
  // sphinx_highlight.js marks nothing where the search's own script is loaded, and the
  // theme loads that on every page. Only on the page of results is it right to leave it.
  function mark() {
    if (typeof SphinxHighlight === "undefined" || document.getElementById("search-results")) return;
    SphinxHighlight.highlightSearchWords();
    setTimeout(() => {
      const found = document.querySelector("article .highlighted");
      if (!found) return;
      const folded = found.closest("details");
      if (folded) folded.open = true;
      if (!location.hash) found.scrollIntoView({ block: "center" });
    }, 50);
  }

  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("article details:not([open])")];
    opened.forEach((folded) => { folded.open = true; });
  });
  window.addEventListener("afterprint", () => {
    opened.forEach((folded) => { folded.open = false; });
  });

  if (document.readyState === "loading") addEventListener("DOMContentLoaded", mark);
  else mark();
})();
