// What the theme leaves undone: a search without a server, its words marked where a result
// lands, what is folded opened on paper, and wide figures that say that they slide.
"use strict";
(function () {
  // For a line of text below each result the pages are fetched, which no browser does from disk.
  if (location.protocol === "file:" && typeof DOCUMENTATION_OPTIONS !== "undefined") {
    DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
  }

  // sphinx_highlight.js marks nothing where the search's own script is loaded, and the
  // theme loads that on every page. Only on the page of results is it right to leave it.
  function mark() {
    if (typeof SphinxHighlight === "undefined" || document.getElementById("search-results")) return;
    SphinxHighlight.highlightSearchWords();
    setTimeout(() => {
      const seen = (place) => place.getClientRects().length || place.closest("details");
      const found = [...document.querySelectorAll("article .highlighted")].find(seen);
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

  // On a phone a wide figure or line slides: its edge fades as long as there is more of it,
  // and the arrow keys move it.
  const WIDE = "article pre, article :is(div.cell_output, div.output, p):has(> :is(img, table, svg))";
  function slide(box) {
    const more = box.scrollWidth - box.clientWidth > 1;
    box.classList.toggle("slides", more);
    box.classList.toggle("slid", more && box.scrollLeft + box.clientWidth > box.scrollWidth - 2);
    if (more) box.tabIndex = 0;
    else box.removeAttribute("tabindex"); // the theme gives one to each <pre>
  }

  function start() {
    mark();
    const watch = new ResizeObserver((all) => all.forEach((one) => slide(one.target)));
    document.querySelectorAll(WIDE).forEach((box) => {
      box.addEventListener("scroll", () => slide(box), { passive: true });
      watch.observe(box);
    });
  }

  if (document.readyState === "loading") addEventListener("DOMContentLoaded", start);
  else start();
})();
