// Figures that ask the trained model: what the training saw (chapter 9), a prompt to build (10),
// where a word looks (11). flamingo.js is the model, figures.js the frame around each figure.
//
// Weights are loaded after a click. A figure's element says in data-state whether it is "busy" or
// "done"; what it shows now, in numbers, is element.shows: for tests, and for the curious.
"use strict";
(function () {
  const { make, button } = liveFigures, here = document.currentScript.src;
  const IMAGE = "<image>", EOC = "<|endofchunk|>";
  const MARK = /<(image|\|endofchunk\||\/?s|unk|pad)>/; // what only a prompt itself may hold
  const beside = (name) => new URL(name, here).href;
  const two = (number) => number.toFixed(2), percent = (share) => `${Math.round(100 * share)} %`;

  function script(name) { // a file beside this one: modules do not start from file://
    return new Promise((done, failed) => {
      const wrong = () => failed(new Error(`cannot read ${name} beside this page`));
      document.head.append(make("script", { src: beside(name), charset: "utf-8", onload: done, onerror: wrong }));
    });
  }
  document.head.append(make("link", { rel: "stylesheet", href: beside("figures_model.css") }));

  // ---- What the figures share ----------------------------------------------------------

  let model;
  async function withModel(element, opened) { // a button; the figure after a click on it
    model = model || (window.flamingoLite ? Promise.resolve() : script("flamingo.js"));
    await model;
    flamingoLite.door(element, "Load the model (15 MB)", async (brought) => {
      const all = [...brought.drawings, ...brought.scenes.probe, ...brought.scenes.pairs];
      await Promise.all(all.map(async (one) => {
        one.name = one.thing ? `${one.thing} by ${one.studio}` : one.text;
        one.image = one.image || make("img", { src: one.src, alt: "" });
        await one.image.decode();
      }));
      return opened(brought);
    });
  }

  const picture = (one, size) => make("img", { src: one.src, alt: "", width: size, height: size });
  const press = (buttons, chosen) => buttons.forEach((one, number) => { one.ariaPressed = String(number === chosen); });

  const frame = (element) => element.closest(".live-figure");
  const shows = (element, more) => { frame(element).shows = { ...frame(element).shows, ...more }; };

  // Work that takes a while. Only the latest is shown: what was asked for since makes it stale.
  function worker(element, said) {
    let latest = 0;
    return async (work, show) => {
      const mine = ++latest;
      frame(element).dataset.state = "busy";
      said.textContent = "Looking …";
      await new Promise((go) => setTimeout(go, 20)); // so that the words are seen
      let found, fault = "";
      try {
        if (mine === latest) found = await work();
      } catch (error) {
        fault = error.message;
      }
      if (mine !== latest) return;
      said.textContent = fault;
      if (found !== undefined) show(found);
      if (mine === latest) frame(element).dataset.state = "done"; // or `show` asked for more
    };
  }

  function table(head, rows) {
    const row = (cells, tag) => make("tr", {}, ...cells.map((cell) => (cell instanceof Node ? cell : make(tag, {}, String(cell)))));
    const body = make("tbody", {}, ...rows.map((cells) => row(cells, "td")));
    return make("div", { className: "live-slide" }, make("table", {}, make("thead", {}, row(head, "th")), body));
  }
  const named = (text) => make("td", { className: "model-name live-token" }, text.replace(/ /g, "\u00a0"));
  function bar(share, kind = "") {
    const inside = make("span", { className: kind, ariaHidden: "true" });
    inside.style.width = `${Math.max(0, Math.min(1, share)) * 100}%`;
    return make("td", { className: "model-bar" }, inside);
  }

  // ---- Chapter 9: what the training saw ------------------------------------------------

  const OWN = "#d6336c", OTHER = "#1c7ed6";

  // Losses by step, (step, true, shuffled), with a line where the slider is.
  function chart(looks, chosen, width) {
    const svg = (tag, attributes, text = "") => {
      const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
      Object.entries(attributes).forEach(([name, value]) => element.setAttribute(name, value));
      element.textContent = text;
      return element;
    };
    const height = 190, left = 34, right = 12, bottom = 34, top = 20, last = looks[looks.length - 1].step || 1;
    const most = Math.max(1, ...looks.flatMap((look) => [look.true, look.shuffled]));
    const x = (step) => left + ((width - left - right) * step) / last, y = (loss) => top + (height - top - bottom) * (1 - loss / most);
    const drawn = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    for (let loss = 0; loss <= most; loss += 1) {
      drawn.append(svg("line", { x1: left, x2: width - right, y1: y(loss), y2: y(loss), stroke: "currentColor", "stroke-opacity": loss ? 0.15 : 0.6 }));
      drawn.append(svg("text", { x: left - 6, y: y(loss) + 4, "text-anchor": "end" }, loss));
    }
    drawn.append(svg("text", { x: left - 6, y: 11 }, "loss"));
    for (const step of [0, last / 2, last]) {
      const anchor = step === last ? "end" : "middle";
      drawn.append(svg("text", { x: x(step), y: height - 16, "text-anchor": anchor }, step === last ? `step ${step}` : Math.round(step)));
    }
    const at = looks[chosen].step;
    drawn.append(svg("line", { x1: x(at), x2: x(at), y1: top, y2: height - bottom, stroke: "currentColor", "stroke-width": 1.5, "stroke-dasharray": "2 3" }));
    for (const [kind, colour, dashes] of [["shuffled", OTHER, "6 4"], ["true", OWN, "none"]]) {
      const points = looks.map((look) => `${x(look.step)},${y(look[kind])}`).join(" ");
      drawn.append(svg("polyline", { points, fill: "none", stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dashes }));
      drawn.append(svg("circle", { cx: x(at), cy: y(looks[chosen][kind]), r: 5, fill: colour }));
    }
    return drawn;
  }

  function curves(element, runs) {
    let run = runs[0];
    const place = make("div", {}), said = make("output", { htmlFor: "live-step" });
    const step = make("input", { type: "range", id: "live-step", min: 0, step: 1, oninput: show });
    const which = make("select", { id: "live-run", onchange: () => { run = runs[which.value]; begin(); } });
    runs.forEach(({ name }, number) => which.append(make("option", { value: number }, name)));
    const choice = make("p", { className: "live-row", hidden: runs.length < 2 }, make("label", { htmlFor: "live-run" }, "Losses of"), which);
    const key = make("p", {}, "Scenes that are not trained on: ");
    for (const [colour, dashes, words] of [[OWN, "solid", "beside their own pictures"], [OTHER, "dashed", "beside each other's"]]) {
      const line = make("span", { ariaHidden: "true" });
      line.style.cssText = `display: inline-block; width: 2rem; border-top: 3px ${dashes} ${colour}; vertical-align: middle;`;
      key.append(line, ` ${words}${colour === OWN ? ", " : "."}`);
    }
    element.append(choice, key, place, make("p", { className: "live-row" }, make("label", { htmlFor: "live-step" }, "Step"), step), make("p", {}, said));

    function begin() {
      step.max = run.looks.length - 1;
      step.value = Math.floor(run.looks.length / 2);
      show();
    }
    function show() {
      const look = run.looks[step.value], gap = look.shuffled - look.true;
      place.replaceChildren(chart(run.looks, Number(step.value), Math.max(260, place.clientWidth || 560)));
      const words = `Step ${look.step}: ${two(look.true)} beside their own pictures, ${two(look.shuffled)} beside others'. `;
      said.textContent = `${words}The right picture is worth ${two(gap)}.`;
      step.setAttribute("aria-valuetext", said.textContent);
      shows(element, { look });
    }
    addEventListener("resize", show);
    begin();
  }

  // A caption under its own picture and under another: the loss of each token, with the final model.
  function swap(element, { scenes }) {
    const probe = scenes.probe, said = make("p", { role: "status", className: "live-quiet" }), work = worker(element, said);
    let own = 0, other = 1;
    const which = make("select", { id: "live-caption", onchange: () => { own = Number(which.value); other = (own + 1) % probe.length; ask(); } });
    probe.forEach((scene, number) => which.append(make("option", { value: number }, scene.text)));
    const pictures = probe.map((scene, number) => button(picture(scene, 52), () => { other = number; ask(); }, { ariaLabel: `the picture of ${scene.text}`, title: scene.text }));
    const large = make("div", { className: "model-large" }), found = make("div", { ariaLive: "polite" });
    const its = button("Its own picture", () => { other = own; ask(); }), next = button("The next one's", () => { other = (own + 1) % probe.length; ask(); });
    element.append(
      make("p", { className: "live-row" }, make("label", { htmlFor: "live-caption" }, "Caption"), which, its, next),
      make("p", {}, "The picture to put above it:"),
      make("div", { className: "model-pictures", role: "group", ariaLabel: "Pictures" }, ...pictures),
      make("div", { className: "model-beside" }, large, found), said,
    );

    function ask() {
      const text = `${IMAGE}${probe[own].text}${EOC}`, mine = own, shown = other;
      press(pictures, other);
      large.replaceChildren(make("img", { src: probe[other].src, alt: `${probe[other].text}, the picture above the caption` }));
      work(async () => [await flamingoLite.token_losses([probe[mine].image], text), await flamingoLite.token_losses([probe[shown].image], text)], (pair) => {
        const [beside_own, beside_other] = pair.map((tokens) => tokens.filter((token) => token.loss !== null));
        const mean = (tokens) => tokens.reduce((sum, token) => sum + token.loss, 0) / tokens.length;
        const most = Math.max(...beside_own.map((t) => t.loss), ...beside_other.map((t) => t.loss), 1);
        const rows = beside_own.map((token, i) => {
          const loss = beside_other[i].loss;
          return [named(token.text), two(token.loss), two(loss), bar(loss / most, "model-other")];
        });
        const words = `${two(mean(beside_own))} beside its own picture, ${two(mean(beside_other))} ${mine === shown ? "beside the same" : "beside this one"}`;
        found.replaceChildren(make("p", { className: "model-answer" }, `Loss ${words}`), table(["token", "own", "this", "loss beside this one"], rows));
        shows(element, { caption: probe[mine].text, picture: probe[shown].text, own: mean(beside_own), other: mean(beside_other) });
      });
    }
    ask();
    return which;
  }

  liveFigures.register("training", (element, still) => {
    const first = make("div", {}), second = make("div", {});
    const title = (text) => make("p", { className: "model-title" }, text);
    element.append(title("While it trains"), first, title("The trained model: another picture above a caption"), second);
    script("flamingo_curves.js").then(() => {
      if (flamingoCurves.length) curves(first, flamingoCurves);
      else first.append(make("p", {}, "Chapter 9 has not been run yet: its losses show here when it has."));
    });
    withModel(second, (brought) => swap(second, brought));
  });

  // ---- Chapter 10: a prompt to build ---------------------------------------------------

  const EXAMPLES = { // demonstrations, then the picture asked about: [thing, studio, text]
    "Two new words": [["camel", "noto", "a guf"], ["saxophone", "noto", "a dab"], ["saxophone", "openmoji"]],
    "Three new words": [["scissors", "noto", "a guf"], ["church", "noto", "a dab"], ["cherries", "noto", "a kubil"], ["cherries", "openmoji"]],
    "What kind?": [["fox", "twemoji", "animal"], ["red apple", "twemoji", "food"], ["rocket", "openmoji"]],
    "What is it called?": [["owl", "fluent", "owl"], ["guitar", "openmoji", "guitar"], ["lemon", "twemoji"]],
  };
  const MOST = 5; // demonstrations

  function promptFigure(element, { drawings }) {
    let cards = [], chosen = 0, right = []; // cards: {one, text}, the last without a text; right: before it was spoilt
    const said = make("p", { role: "status", className: "live-quiet" }), work = worker(element, said);
    const blank = { name: "a blank picture", src: (() => {
      const canvas = make("canvas", { width: 64, height: 64 }), ink = canvas.getContext("2d", { willReadFrequently: true });
      ink.fillStyle = "#fff";
      ink.fillRect(0, 0, 64, 64);
      return canvas.toDataURL();
    })() };
    blank.image = make("img", { src: blank.src, alt: "" });

    const examples = Object.entries(EXAMPLES).map(([name, wanted]) => button(name, () => {
      cards = wanted.map(([thing, studio, text = ""]) => ({ one: drawings.find((d) => d.thing === thing && d.studio === studio), text }));
      begin();
    }));
    const ways = { // chapter 10's `spoil`
      "As it was": (shown) => shown,
      "No pictures": (shown) => shown.map((card) => ({ ...card, one: blank })),
      "Wrong pictures": (shown) => {
        const inside = new Set(right.map((card) => card.one.thing)), others = drawings.filter((d) => !inside.has(d.thing));
        return shown.map((card) => ({ ...card, one: others.splice(Math.floor(Math.random() * others.length), 1)[0] }));
      },
      "Shuffled texts": (shown) => {
        const kinds = [...new Set(shown.map((card) => card.text))];
        return shown.map((card) => ({ ...card, text: kinds[(kinds.indexOf(card.text) + 1) % kinds.length] }));
      },
    };
    const spoils = Object.entries(ways).map(([name, spoil], number) => button(name, () => {
      cards = [...spoil(right.slice(0, -1)), right[right.length - 1]];
      press(spoils, number);
      show();
      ask();
    }));
    const more = button("One more demonstration", () => { cards.splice(-1, 0, { one: drawings[cards.length], text: "a dax" }); begin(cards.length - 2); });
    const less = button("One less", () => { cards.splice(-2, 1); begin(); });
    const places = make("div", { className: "model-cards", role: "group", ariaLabel: "The prompt" });
    const chooser = drawings.map((one) => button(picture(one, 44), () => put(one), { ariaLabel: one.name, title: one.name }));
    const prompt = make("p", { className: "model-prompt" }), answer = make("p", { className: "model-answer", ariaLive: "polite" }), found = make("div", {});
    element.append(
      make("div", { className: "live-row" }, ...examples), places,
      make("div", { className: "live-row" }, more, less),
      make("p", {}, "A picture for the marked place:"),
      make("div", { className: "model-pictures model-all", role: "group", ariaLabel: "Drawings" }, ...chooser),
      make("div", { className: "live-row", role: "group", ariaLabel: "Controls" }, make("strong", {}, "Controls: "), ...spoils),
      prompt, answer, said, found,
    );

    function begin(mark = cards.length - 1) { // a prompt of the reader's own, or an example
      right = cards.map((card) => ({ ...card }));
      chosen = mark;
      press(spoils, 0);
      show();
      ask();
    }
    function put(one) {
      cards[chosen] = { ...cards[chosen], one };
      begin(chosen);
    }
    function show() {
      const focused = [...places.querySelectorAll("button, input")].indexOf(document.activeElement);
      places.replaceChildren(...cards.map((card, number) => {
        const isLast = number === cards.length - 1, name = isLast ? "Picture asked about" : `Picture ${number + 1}`;
        const place = button(picture(card.one, 100), () => { chosen = number; show(); }, { className: "model-place", ariaLabel: `${name}: ${card.one.name}`, title: card.one.name, ariaPressed: String(number === chosen) });
        const word = make("input", { type: "text", value: card.text, ariaLabel: `Text ${number + 1}`, spellcheck: false, autocomplete: "off", oninput: () => type(number, word.value) });
        return make("div", { className: "model-card" }, place, isLast ? make("p", {}, "what is this?") : word);
      }));
      const same = places.querySelectorAll("button, input")[focused];
      if (focused >= 0 && same) same.focus();
      more.disabled = cards.length > MOST;
      less.disabled = cards.length < 2;
    }
    let pause;
    function type(number, text) {
      cards[number] = { ...cards[number], text };
      right = cards.map((card) => ({ ...card }));
      press(spoils, 0);
      frame(element).dataset.state = "busy";
      clearTimeout(pause);
      pause = setTimeout(ask, 400);
    }
    function ask() {
      clearTimeout(pause);
      const texts = cards.slice(0, -1).map((card) => card.text.trim()), whole = `${texts.map((text) => `${IMAGE}${text}${EOC}`).join("")}${IMAGE}`;
      const images = cards.map((card) => card.one.image), empty = texts.indexOf(""), special = texts.findIndex((text) => MARK.test(text));
      prompt.textContent = whole;
      answer.textContent = "";
      found.replaceChildren();
      work(async () => {
        if (empty >= 0) throw new Error(`Demonstration ${empty + 1} has no text: type one.`);
        if (special >= 0) throw new Error(`Demonstration ${special + 1}: ${texts[special]} holds a mark of the prompt itself. Type plain words.`);
        await Promise.all(images.map((image) => image.decode()));
        const written = await flamingoLite.caption(images, whole, { max_new_tokens: 8 });
        const candidates = [...new Set([...texts, written])].filter((text) => text);
        return { written, candidates, scores: await flamingoLite.score_candidates(images, whole, candidates) };
      }, ({ written, candidates, scores }) => {
        const order = candidates.map((_, i) => i).sort((a, b) => scores[b] - scores[a]);
        answer.textContent = `It writes: ${written || "nothing"}`;
        found.replaceChildren(table(["answer", "log-probability", "probability", "of all that it could write"], order.map((i) => {
          const text = candidates[i] + (texts.includes(candidates[i]) ? "" : " (not in the prompt)");
          return [named(text), two(scores[i]), percent(Math.exp(scores[i])), bar(Math.exp(scores[i]))];
        })));
        shows(element, { prompt: whole, pictures: cards.map((card) => card.one.name), written, candidates, scores });
      });
    }
    examples[0].click();
    return examples[0];
  }

  liveFigures.register("prompt", (element, still) => {
    withModel(element, (brought) => { if (still) still.hidden = true; return promptFigure(element, brought); });
    return false; // the still picture stays until the model is here
  });

  // ---- Chapter 11: where a word looks --------------------------------------------------

  function lookFigure(element, { scenes, config }) {
    const said = make("p", { role: "status", className: "live-quiet" }), work = worker(element, said);
    const pairs = scenes.pairs, { layers, heads } = config.cross_attention;
    let chosen = 0, words = [], word = 0;
    const pictures = pairs.map((scene, number) => button(picture(scene, 52), () => { chosen = number; text.value = scene.text; ask(); }, { ariaLabel: `a scene: ${scene.text}`, title: scene.text }));
    const select = (id, n) => make("select", { id, onchange: show }, make("option", { value: -1 }, "all"), ...Array.from({ length: n }, (_, i) => make("option", { value: i }, i + 1)));
    const block = select("live-block", layers.length), head = select("live-head", heads);
    let pause;
    const text = make("input", { type: "text", id: "live-text", spellcheck: false, autocomplete: "off", oninput: () => {
      frame(element).dataset.state = "busy";
      clearTimeout(pause);
      pause = setTimeout(ask, 400);
    } });
    const own = button("What the model writes", () => {
      clearTimeout(pause);
      work(() => flamingoLite.caption([pairs[chosen].image]), (written) => { text.value = written; ask(); });
    });
    const canvas = make("canvas", { ariaHidden: "true" }), large = make("div", { className: "model-large model-mapped" });
    const line = make("div", { className: "model-words", role: "group", ariaLabel: "Words of the caption" }), told = make("p", { ariaLive: "polite" });
    element.append(
      make("div", { className: "model-pictures", role: "group", ariaLabel: "Pictures" }, ...pictures),
      make("div", { className: "model-beside" }, large, make("div", {},
        make("p", {}, "Point at a word, or go to it with Tab:"), line,
        make("p", { className: "live-row" }, make("label", { htmlFor: "live-block" }, "Layer"), block, make("label", { htmlFor: "live-head" }, "Head"), head),
        told,
        make("p", {}, make("label", { htmlFor: "live-text" }, "Another caption for this picture:"), text), make("p", {}, own), said)),
    );

    function ask() {
      clearTimeout(pause);
      const scene = pairs[chosen], caption = text.value.trim();
      press(pictures, chosen);
      work(async () => {
        if (!caption) throw new Error("There is no caption: type one.");
        if (MARK.test(caption)) throw new Error("A caption is plain words, without the marks of a prompt.");
        return flamingoLite.token_losses([scene.image], `${IMAGE}${caption}`);
      }, (tokens) => {
        large.replaceChildren(make("img", { src: scene.src, alt: `The picture: ${scene.text}` }), canvas);
        // Tokens to words: one that begins with a blank begins a word, and its map is the word's.
        words = [];
        for (const token of tokens.filter((one) => one.loss !== null)) {
          if (!words.length || token.text.startsWith(" ")) words.push({ ...token, text: token.text.trim() });
          else words[words.length - 1].text += token.text;
        }
        line.replaceChildren(...words.map((one, number) => {
          const look = () => { word = number; show(); };
          return button(one.text, look, { onmouseenter: look, onfocus: look });
        }));
        word = Math.max(0, words.findIndex((one) => scene.things.includes(one.text)));
        show();
      });
    }
    function show() {
      if (!words.length) return;
      const map = flamingoLite.mean_map(words[word].maps, 0, Number(block.value), Number(head.value));
      const side = Math.sqrt(map.length), sum = (wanted) => map.reduce((total, share, p) => total + (wanted(p % side, Math.floor(p / side)) ? share : 0), 0);
      press([...line.children], word);
      flamingoLite.paint(canvas, map);
      const left = sum((x) => x < side / 2), upper = sum((_, y) => y < side / 2);
      told.textContent = `“${words[word].text}”: ${percent(left)} of the weight lies in the left half of the picture, ${percent(upper)} in the upper half. The darkest patch has ${percent(Math.max(...map))}.`;
      shows(element, { picture: pairs[chosen].text, caption: text.value.trim(), word: words[word].text, number: word, map: [...map], left, upper });
    }
    pictures[1].click();
    return pictures[1];
  }

  liveFigures.register("look", (element, still) => {
    withModel(element, (brought) => { if (still) still.hidden = true; return lookFigure(element, brought); });
    return false;
  });
})();
