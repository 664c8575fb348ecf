// The page play.html: pictures, a prompt, and what flamingo.js makes of them.
"use strict";
(function () {
  const root = document.getElementById("play");
  if (!root) return;
  const EOC = "<|endofchunk|>", IMAGE = "<image>";
  const { make, button } = liveFigures; // of figures.js

  // ---- The door: nothing is loaded before a click ----
  flamingoLite.door(root, "Load the model (15 MB)", async ({ drawings }) => {
    document.querySelectorAll(".play-still").forEach((still) => { still.hidden = true; });
    await open(drawings);
    return root.querySelector("h3 + div button");
  });
  root.hidden = false;

  // ---- The workshop ----
  async function open(drawings) {
    let slots = [], kept = [], chosen = 0, run = 0, last = []; // slots: {image, name} or null, one for each <image>
    const picture = (drawing) => drawing && { image: drawing.image, name: `${drawing.thing} by ${drawing.studio}` };
    await Promise.all(drawings.map(async (drawing) => {
      drawing.image = make("img", { src: drawing.src, alt: "", width: 48, height: 48 });
      await drawing.image.decode();
    }));
    const by = (thing, studio) => picture(drawings.find((d) => d.thing === thing && d.studio === studio));

    const EXAMPLES = {
      "A caption": [[["flamingo", "openmoji"]], IMAGE],
      "A question": [[["lemon", "twemoji"]], `${IMAGE}question: what is this? answer:`],
      "What kind?": [[["fox", "twemoji"], ["red apple", "twemoji"], ["rocket", "openmoji"]], `${IMAGE}animal${EOC}${IMAGE}food${EOC}${IMAGE}`],
      "Two new words": [[["camel", "noto"], ["saxophone", "noto"], ["saxophone", "openmoji"]], `${IMAGE}a guf${EOC}${IMAGE}a dab${EOC}${IMAGE}`],
      "Three new words": [[["scissors", "noto"], ["church", "noto"], ["cherries", "noto"], ["cherries", "openmoji"]], `${IMAGE}a guf${EOC}${IMAGE}a dab${EOC}${IMAGE}a kubil${EOC}${IMAGE}`],
    };
    const examples = make("div", { className: "play-row", role: "group", ariaLabel: "Examples" });
    for (const [name, [wanted, text]] of Object.entries(EXAMPLES)) {
      examples.append(button(name, () => {
        slots = wanted.map((which) => by(...which));
        kept = [];
        prompt.value = text;
        chosen = slots.length - 1;
        write();
      }));
    }

    const chooser = make("div", { className: "play-drawings", role: "group", ariaLabel: "Drawings" });
    for (const drawing of drawings) {
      const name = `${drawing.thing} by ${drawing.studio}${drawing.trained ? "" : ", a studio never trained on"}`;
      chooser.append(button(drawing.image, () => put(picture(drawing)), {
        title: name, ariaLabel: name, draggable: true,
        ondragstart: (event) => event.dataTransfer.setData("text/x-drawing", drawings.indexOf(drawing)),
      }));
    }

    const file = make("input", { type: "file", accept: "image/*", multiple: true, id: "play-file", onchange: () => putFiles(file.files) });
    async function putFiles(files, place = chosen) {
      for (const one of files) {
        const image = make("img", { src: URL.createObjectURL(one), alt: "" });
        try {
          await image.decode();
          put({ image, name: one.name }, place);
          if (place < slots.length - 1) place += 1;
        } catch {
          status.textContent = `${one.name} is not a picture that this browser can read.`;
        }
      }
    }

    // A canvas to draw on, with the mouse, a finger or a pen; with the keyboard, Shift and arrows.
    const canvas = make("canvas", { width: 256, height: 256, className: "play-canvas", tabIndex: 0, role: "img", ariaLabel: "A canvas to draw on: arrow keys move the brush, and draw while Shift is held" });
    const ink = canvas.getContext("2d", { willReadFrequently: true });
    const colour = make("input", { type: "color", value: "#e8590c", id: "play-colour" });
    const size = make("input", { type: "range", min: 4, max: 60, value: 20, id: "play-size" });
    const brush = { x: 128, y: 128 };
    const clear = () => { ink.fillStyle = "#fff"; ink.fillRect(0, 0, 256, 256); };
    function stroke(x, y, draws) {
      if (draws) {
        Object.assign(ink, { strokeStyle: colour.value, lineWidth: size.value, lineCap: "round" });
        ink.beginPath();
        ink.moveTo(brush.x, brush.y);
        ink.lineTo(x, y);
        ink.stroke();
      }
      Object.assign(brush, { x, y });
    }
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      return [((event.clientX - box.left) * 256) / box.width, ((event.clientY - box.top) * 256) / box.height];
    };
    canvas.addEventListener("pointerdown", (event) => { canvas.setPointerCapture(event.pointerId); stroke(...at(event), false); stroke(...at(event), true); });
    canvas.addEventListener("pointermove", (event) => stroke(...at(event), event.buttons > 0));
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] }[event.key];
      if (!step) return;
      event.preventDefault();
      stroke(Math.min(256, Math.max(0, brush.x + step[0])), Math.min(256, Math.max(0, brush.y + step[1])), event.shiftKey);
    });
    clear();
    async function useDrawing() {
      const image = make("img", { src: canvas.toDataURL(), alt: "" });
      await image.decode();
      put({ image, name: "your drawing" });
    }
    const drawing = make("details", {}, make("summary", {}, "Draw one"), make("div", { className: "play-draw" }, canvas,
      make("div", {}, make("label", { htmlFor: "play-colour" }, "Colour "), colour, make("label", { htmlFor: "play-size" }, " Brush "), size,
        make("div", { className: "play-row" }, button("Use this drawing", useDrawing), button("Clear", clear)))));

    const places = make("div", { className: "play-slots", role: "group", ariaLabel: "Pictures of the prompt" });
    const prompt = make("textarea", { id: "play-prompt", rows: 3, spellcheck: false, oninput: () => { fit(); show(); } });
    const gates = make("input", { type: "range", min: 0, max: 1, step: 0.05, value: 1, id: "play-gates", oninput: () => { gateSaid.textContent = sayGates(); write(); } });
    const sayGates = () => (Number(gates.value) === 0 ? "shut: the plain language model" : `${Math.round(gates.value * 100)} % of what was trained`);
    const gateSaid = make("output", { htmlFor: "play-gates" }, sayGates());
    const layer = make("select", { id: "play-layer", onchange: () => look(looked) }, make("option", { value: -1 }, "all blocks"));
    const tokens = make("div", { className: "play-tokens", role: "group", ariaLabel: "Tokens" });
    const answer = make("p", { className: "play-answer", ariaLive: "polite" });
    const status = make("p", { className: "play-said", role: "status" });
    const go = button("Write", () => write(), { className: "play-start" });

    const another = button("Another picture", () => {
      const others = drawings.filter((d) => !slots[chosen] || d.image !== slots[chosen].image);
      put(picture(others[Math.floor(Math.random() * others.length)]));
    });
    const shuffled = button("Shuffled", () => { slots.push(slots.shift()); write(); });
    const more = button("One more picture", () => {
      kept = [];
      prompt.value += prompt.value ? `${EOC}${IMAGE}` : IMAGE;
      fit();
      chosen = slots.length - 1;
      show();
    });

    root.append(
      make("h3", {}, "Examples"), examples,
      make("h3", {}, "Pictures"), make("p", {}, "A picture goes to the marked place of the prompt."), chooser,
      make("p", {}, make("label", { htmlFor: "play-file" }, "A file of your own, or drop it on a place: "), file), drawing,
      make("h3", {}, "Prompt"), places,
      make("label", { htmlFor: "play-prompt" }, `Words, with ${IMAGE} where a picture stands and ${EOC} after each demonstration`), prompt,
      make("div", { className: "play-row" }, go, another, shuffled, more),
      make("p", { className: "play-gates" }, make("label", { htmlFor: "play-gates" }, "Gates "), gates, " ", gateSaid),
      make("h3", {}, "What it writes"), answer, status,
      make("p", {}, make("label", { htmlFor: "play-layer" }, "Choose a token to see where it looks, in "), layer), tokens,
    );

    function fit() { // as many places as there are <image>; a picture stays while words are typed anew
      slots.forEach((slot, place) => { kept[place] = slot; });
      const count = prompt.value.split(IMAGE).length - 1;
      slots = Array.from({ length: count }, (_, place) => kept[place] || null);
      chosen = Math.max(0, Math.min(chosen, count - 1));
    }

    function put(one, place = chosen) {
      if (!slots.length) { prompt.value = IMAGE + prompt.value; fit(); }
      slots[place] = one;
      const empty = slots.indexOf(null);
      chosen = empty >= 0 ? empty : place;
      if (empty >= 0) show();
      else write();
    }

    function show() {
      const focused = [...places.children].indexOf(document.activeElement);
      places.replaceChildren(...slots.map((slot, place) => {
        const name = `Picture ${place + 1}: ${slot ? slot.name : "none yet"}`;
        return button("", () => { chosen = place; show(); }, {
          ariaLabel: name, title: name, ariaPressed: String(place === chosen), className: slot ? "" : "play-empty",
          ondragover: (event) => event.preventDefault(),
          ondrop: (event) => {
            event.preventDefault();
            const number = event.dataTransfer.getData("text/x-drawing");
            chosen = place;
            if (number) put(picture(drawings[number]), place);
            else putFiles(event.dataTransfer.files, place);
          },
        });
      }));
      [...places.children].forEach((child, place) => child.append(...slotParts(place)));
      if (focused >= 0 && places.children[focused]) places.children[focused].focus();
      shuffled.disabled = slots.length < 2;
      tokens.replaceChildren();
      looked = null;
      root.dataset.state = "changed";
    }
    function slotParts(place) {
      const slot = slots[place], number = make("span", { className: "play-number" }, String(place + 1));
      if (!slot) return [number];
      return [number, make("img", { src: slot.image.src, alt: "" }), make("canvas", { width: 64, height: 64, className: "play-heat" })];
    }

    async function write() {
      const mine = ++run;
      fit();
      show();
      if (slots.includes(null)) {
        status.textContent = `Picture ${slots.indexOf(null) + 1} is missing: choose one.`;
        return;
      }
      status.textContent = "Looking …";
      answer.textContent = "";
      last = [];
      root.dataset.state = "writing";
      try {
        const text = await flamingoLite.caption(slots.map((slot) => slot.image), prompt.value, {
          gates: Number(gates.value),
          onToken: (token) => {
            if (mine !== run) return false;
            last.push(token);
            addToken(token, last.length - 1);
            return true;
          },
        });
        if (mine !== run) return;
        answer.textContent = text || "(nothing: it ended at once)";
        status.textContent = "";
      } catch (error) {
        if (mine !== run) return;
        status.textContent = error.message;
      }
      root.dataset.state = "done";
    }

    let looked = null;
    function addToken(token, number) {
      const where = token.image ? `may look at picture ${token.image}` : "may look at no picture";
      const sure = token.written ? `, ${Math.round(token.p * 100)} % sure` : ", from the prompt";
      const name = `${token.text.trim() || "space"}: ${where}${sure}`;
      const chip = button(token.text.replace(/ /g, "\u00a0"), () => look(token), {
        className: token.written ? "play-written" : "", title: name, ariaLabel: name, ariaPressed: "false",
        onfocus: () => look(token), onmouseenter: () => look(token),
      });
      chip.dataset.number = number;
      tokens.append(chip);
      if (token.written && token.text !== EOC) look(token);
    }

    // The picture a token may look at, and where, from dark to bright; the others fade.
    function look(token) {
      looked = token;
      if (!token) return;
      if (layer.options.length === 1) token.maps.forEach((_, i) => layer.append(make("option", { value: i }, `block ${i + 1}`)));
      tokens.querySelectorAll("button").forEach((chip) => { chip.ariaPressed = String(last[chip.dataset.number] === token); });
      [...places.children].forEach((place, number) => {
        const heat = place.querySelector(".play-heat"), mayLook = token.maps[0][0][number].some((x) => x > 0);
        place.classList.toggle("play-faded", !mayLook);
        if (!heat) return;
        const map = flamingoLite.mean_map(token.maps, number, Number(layer.value));
        flamingoLite.paint(heat, mayLook ? map : map.map(() => 0));
      });
    }

    examples.firstChild.click();
  }
})();
