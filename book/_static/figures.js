// Figures that answer, in the chapters. No library; each works from file:// and by keyboard.
//
// In a notebook, one Markdown cell, the picture alone in its paragraph:
//
//     ![What the still picture shows.](images/figure_NAME.png)
//
//     One sentence that says what to try.
//
// book/_ext/flamingo_book.py makes of it, on the rendered page,
//
//     <div class="live" data-figure="NAME"><img …></div>
//
// and loads figures.css, this file and, where it says register("NAME", figures_model.js.
// On GitHub, in Colab and without scripts the picture stays. A figure is a function:
//
//     liveFigures.register("NAME", function (element, still) { element.append(…); });
//
// `element` is an empty <div class="live-figure">, `still` the <img>, which is then hidden; a
// figure that returns false (it waits for a click, say) hides it itself: still.hidden = true.
// If the function throws, the picture stays. `liveFigures.make(tag, attributes, …children)` and
// `liveFigures.button(text, onclick, attributes)` make elements; figures.css has their looks.
"use strict";
(function () {
  const figures = new Map();
  let ready = document.readyState !== "loading";

  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name in element && name !== "list") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children);
    return element;
  }
  const button = (text, onclick, more = {}) => make("button", { type: "button", onclick, ...more }, text);

  function mount(place, name, figure) {
    if (place.dataset.mounted !== undefined) return;
    place.dataset.mounted = "";
    const still = place.querySelector("img");
    const element = make("div", { className: "live-figure", role: "group", ariaLabel: `A figure to try: ${name}` });
    place.append(element);
    try {
      if (figure(element, still) !== false && still) still.hidden = true;
    } catch (error) {
      element.remove();
      console.error(error);
    }
  }

  function mountAll(name) {
    document.querySelectorAll(".live").forEach((place) => {
      if (place.dataset.figure === name) mount(place, name, figures.get(name));
    });
  }

  function register(name, figure) {
    figures.set(name, figure);
    if (ready) mountAll(name);
  }

  if (!ready) addEventListener("DOMContentLoaded", () => { ready = true; figures.forEach((_, name) => mountAll(name)); });
  window.liveFigures = { register, make, button };
})();
