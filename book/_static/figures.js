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

// ---- What the figures below share ----------------------------------------------------
(function () {
  const { make, button, register } = window.liveFigures;
  const IMAGE = "<image>", EOC = "<|endofchunk|>", START = "</s>", PAD = "<pad>", IGNORE = -100;
  let number = 0;

  // One of several: radio buttons, so Tab and the arrow keys work. options: {value: words}
  function choice(legend, options, onchange) {
    const name = `live-${++number}`, set = make("fieldset", {}, make("legend", {}, legend));
    Object.entries(options).forEach(([value, words], place) => {
      set.append(make("label", {}, make("input", { type: "radio", name, value, checked: place === 0, onchange }), " ", words));
    });
    Object.defineProperty(set, "chosen", { get: () => set.querySelector(":checked").value });
    return set;
  }

  function labelled(words, field) {
    field.id = `live-${++number}`;
    const wide = field.type === "text" || field.tagName === "TEXTAREA";
    return make("label", { htmlFor: field.id, className: wide ? "live-wide" : "" }, words, " ", field);
  }

  // Words stand for tokens here. A tokenizer would cut some of them, and needs its table.
  const split = (text) => text.match(/<image>|<\|endofchunk\|>|(?:(?!<image>|<\|endofchunk\|>)\S)+/g) || [];
  const short = (token) => (token === EOC ? "<end>" : token);
  const token = (word) => make("span", { className: "live-token" }, short(word));
  const say = (x) => (Number.isNaN(x) ? "nan" : Number.isInteger(x) ? String(x) : x.toFixed(2));
  const status = () => make("p", { className: "live-said", role: "status" });
  const tell = (said, right, words) => {
    said.className = right === null ? "" : `live-said ${right ? "live-right" : "live-wrong"}`;
    said.textContent = `${right === null ? "" : right ? "✓ " : "✗ "}${words}`;
  };

  // ---- mask: 03_cross_attention.html -------------------------------------------------

  function text_time(media_locations) { // 0 before the first image, then 1, 2, …
    let clock = 0;
    return media_locations.map((isImage) => (clock += isImage ? 1 : 0));
  }

  const media_time = (T_img) => Array.from({ length: T_img }, (_, i) => i + 1);

  function text_to_media_mask(media_locations, T_img, only_attend_immediate_media = true) {
    const images = media_time(T_img); // (T_txt, T_img), true = may look
    return text_time(media_locations).map((time) => images.map((image) => (only_attend_immediate_media ? time === image : time >= image)));
  }

  function softmax(scores) {
    const top = Math.max(...scores), powers = scores.map((score) => Math.exp(score - top));
    const sum = powers.reduce((a, b) => a + b, 0);
    return powers.map((power) => power / sum);
  }

  const LOWEST = -3.4028234663852886e38; // torch.finfo(torch.float32).min

  // Weights and what each token reads, if all scores are 0. fill: "-inf", "lowest", "blanked"
  function read_masked(may_look, values, fill) {
    return may_look.map((row) => {
      const blind = fill === "blanked" && !row.some(Boolean); // let it look anywhere, then blank it
      const forbidden = fill === "-inf" ? -Infinity : LOWEST;
      const weights = softmax(row.map((allowed) => (allowed || blind ? 0 : forbidden)));
      const read = weights.reduce((sum, weight, i) => sum + weight * values[i], 0);
      return blind ? { weights: weights.map(() => 0), read: 0 } : { weights, read };
    });
  }

  const MOST_TOKENS = 24, MOST_IMAGES = 6;

  register("mask", (root) => {
    const prompt = make("input", { type: "text", value: `${IMAGE}a lemon${IMAGE}two owls`, spellcheck: false, oninput: draw });
    const rule = choice("A token may look at", { last: "the last picture", all: "all pictures so far" }, draw);
    const fill = choice("In forbidden places stands", { "-inf": "−∞", lowest: "the lowest finite number", blanked: "the same, and blind rows are blanked" }, draw);
    const said = status(), place = make("div", { className: "live-slide", tabIndex: 0, role: "region", ariaLabel: "The mask" });
    root.append(make("div", {}, labelled("A prompt", prompt)), rule, fill, said, place,
      make("p", { className: "live-quiet" }, "Words stand for tokens. Picture 1 holds the number 10, picture 2 the number 20, and so on; all scores are 0, so a token weighs what it may look at evenly. In each place of the mask: ✓ it may look, and the weight that softmax gives."));

    function draw() {
      const whole = [START, ...split(prompt.value)], tokens = whole.slice(0, MOST_TOKENS);
      const over = text_time(tokens.map((word) => word === IMAGE)).findIndex((time) => time > MOST_IMAGES);
      if (over > 0) tokens.length = over;
      const locations = tokens.map((word) => word === IMAGE), T_img = locations.filter(Boolean).length;
      const may_look = text_to_media_mask(locations, T_img, rule.chosen === "last");
      const read = read_masked(may_look, media_time(T_img).map((image) => 10 * image), fill.chosen);
      const head = make("tr", {}, ...["token", "text time"].map((words) => make("th", { scope: "col" }, words)));
      media_time(T_img).forEach((image) => head.append(make("th", { scope: "col" }, `picture ${image}`)));
      head.append(make("th", { scope: "col" }, "reads"));
      const clock = make("tr", {}, make("th", { scope: "row", colSpan: 2 }, "media time"), ...media_time(T_img).map((image) => make("td", {}, String(image))), make("td"));
      const body = make("tbody"), times = text_time(locations);
      tokens.forEach((word, t) => {
        const blind = !may_look[t].some(Boolean), line = make("tr", {}, make("th", { scope: "row" }, token(word)), make("td", {}, String(times[t])));
        read[t].weights.forEach((weight, i) => {
          const wrong = !may_look[t][i] && weight !== 0;
          const look = may_look[t][i] ? "live-on" : wrong ? "live-wrong" : "live-quiet";
          line.append(make("td", { className: look }, `${may_look[t][i] ? "✓ " : wrong ? "✗ " : ""}${say(weight)}`));
        });
        const wrong = blind && T_img > 0 && read[t].read !== 0;
        line.append(make("td", { className: wrong ? "live-wrong" : "" }, `${wrong ? "✗ " : ""}${say(read[t].read)}`));
        body.append(line);
      });
      place.replaceChildren(make("table", {}, make("thead", {}, head, ...(T_img ? [clock] : [])), body));
      const first = locations.indexOf(true), blind = tokens.slice(0, first < 0 ? tokens.length : first);
      const who = blind.length === 1 ? `${START} comes` : `${blind.map(short).join(", ")} come`;
      const cut = tokens.length < whole.length ? ` (Shown: the first ${MOST_TOKENS} tokens, at most ${MOST_IMAGES} pictures.)` : "";
      const looks = `${tokens.length - blind.length} of ${tokens.length} tokens look at a picture.${cut}`;
      if (!T_img) tell(said, null, `No ${IMAGE}, so no picture: every token reads nothing. Type ${IMAGE} somewhere.`);
      else if (fill.chosen === "-inf") tell(said, false, `${who} before every picture: a whole row of −∞, and softmax makes nan of it. ${looks}`);
      else if (fill.chosen === "lowest") tell(said, false, `${who} before every picture, and read${blind.length === 1 ? "s" : ""} ${say(read[0].read)}, ${T_img > 1 ? "an even mix of all pictures, which come later" : "the picture that comes later"}. ${looks}`);
      else tell(said, true, `${who} before every picture, and read${blind.length === 1 ? "s" : ""} exactly 0. ${looks}`);
    }
    draw();
  });

  // ---- labels: 06_loss.html ----------------------------------------------------------

  function make_labels(input_ids, media_token_id, eoc_token_id, attention_mask = null) {
    if (media_token_id === eoc_token_id) throw new Error(`<image> and <|endofchunk|> have one id, ${eoc_token_id}`);
    return input_ids.map((row, b) => {
      let latest_image = 0, latest_end = 0; // their places, counted from 1; 0 = none yet
      return row.map((id, t) => {
        const is_text = !attention_mask || Boolean(attention_mask[b][t]), was_open = latest_image > latest_end;
        const is_image = id === media_token_id && is_text;
        if (is_image) latest_image = t + 1;
        if (id === eoc_token_id && is_text) latest_end = t + 1;
        return was_open && is_text && !is_image ? id : IGNORE;
      });
    });
  }

  // What the logits at each token are marked against: the label one place to the right.
  const shifted = (labels) => labels.map((row) => [...row.slice(1), IGNORE]);

  // Rows of words to (ids, mask), padded to the longest; vocab[id] is a word.
  function tokenize(texts, padding_side) {
    const rows = texts.map((text) => [START, ...split(text)]), T_txt = Math.max(...rows.map((row) => row.length));
    const vocab = [...new Set([PAD, START, EOC, IMAGE, ...rows.flat()])];
    const pad = (row, what, fill) => {
      const filling = Array(T_txt - row.length).fill(fill);
      return padding_side === "left" ? [...filling, ...row.map(what)] : [...row.map(what), ...filling];
    };
    return {
      vocab,
      input_ids: rows.map((row) => pad(row, (word) => vocab.indexOf(word), 0)),
      attention_mask: rows.map((row) => pad(row, () => 1, 0)),
    };
  }

  // Arrow keys move along buttons of which Tab meets only one.
  function arrows(event) {
    const all = [...event.currentTarget.querySelectorAll("button")], at = all.indexOf(document.activeElement);
    const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
    if (at < 0 || to === undefined || !all[to]) return;
    event.preventDefault();
    all[to].focus();
  }

  register("labels", (root) => {
    const START_TEXT = `this is${IMAGE}a red apple${EOC}this${IMAGE}a lemon${EOC}\n${IMAGE}a hot air balloon${EOC}`;
    const prompt = make("textarea", { rows: 3, value: START_TEXT, spellcheck: false, oninput: draw });
    const side = choice("Padding on the", { right: "right", left: "left" }, draw);
    const which = choice("Labels", { made: "make_labels", ids: "the tokens themselves" }, draw);
    const shift = choice("Marked against", { one: "the next label", none: "the token's own label (no shift)" }, draw);
    const said = status(), count = make("p"), place = make("div");
    root.append(make("div", {}, labelled("A batch, one row a line", prompt)), side, which, shift, count, place, said,
      make("p", { className: "live-quiet" }, "In each card: the token, its label, and → what the model is asked for there. A pink token has a label. Choose a card, or go from card to card with the arrow keys. Words stand for tokens, <end> for <|endofchunk|>."));

    function draw() {
      const texts = prompt.value.split("\n").filter((text) => text.trim()).slice(0, 4);
      if (!texts.length) texts.push("");
      const { vocab, input_ids, attention_mask } = tokenize(texts, side.chosen);
      const made = make_labels(input_ids, vocab.indexOf(IMAGE), vocab.indexOf(EOC), attention_mask);
      const labels = which.chosen === "made" ? made : input_ids;
      const answers = shift.chosen === "one" ? shifted(labels) : labels;
      const word = (id) => (id === IGNORE ? "−100" : short(vocab[id]));
      place.replaceChildren(...input_ids.map((row, b) => {
        const cards = make("div", { className: "live-cards", role: "group", ariaLabel: `Row ${b}`, onkeydown: arrows });
        row.forEach((id, t) => {
          const label = labels[b][t], answer = answers[b][t];
          const asks = answer === IGNORE ? "–" : `→ ${word(answer)}`;
          const card = button("", () => card.focus(), {
            tabIndex: t ? -1 : 0, onfocus: () => chosen(b, t),
            ariaLabel: `${word(id)}: label ${label === IGNORE ? "minus 100" : word(label)}, ${answer === IGNORE ? "asked for nothing" : `asked for ${word(answer)}`}`,
          });
          card.append(make("span", { className: `live-token ${label === IGNORE ? "" : "live-on"}` }, word(id)),
            make("span", { className: label === IGNORE ? "live-quiet" : "" }, word(label)), make("span", {}, asks));
          cards.append(card);
        });
        return make("div", {}, make("p", { className: "live-quiet" }, `row ${b}`), cards);
      }));
      const all = labels.flat().length, asked = answers.flat().filter((id) => id !== IGNORE).length;
      const silly = labels.flat().filter((id, i) => id !== IGNORE && made.flat()[i] === IGNORE).length;
      let words = `At ${asked} of ${all} places something is asked.`;
      if (silly) words += ` ✗ ${silly} labels ask for what should not be asked: </s>, <image>, padding, or words outside a chunk.`;
      if (shift.chosen === "none") words += " ✗ Each token is marked against itself, which the model has just read: a copier gets it all right.";
      count.className = silly || shift.chosen === "none" ? "live-said live-wrong" : "";
      count.textContent = words;
      tell(said, null, "");

      function chosen(b, t) {
        const cards = [...place.children].map((row) => [...row.querySelectorAll("button")]), answer = answers[b][t];
        cards.flat().forEach((card) => { card.classList.remove("live-chosen", "live-answer"); card.tabIndex = -1; });
        cards.forEach((row, i) => { row[i === b ? t : 0].tabIndex = 0; });
        cards[b][t].classList.add("live-chosen");
        const to = shift.chosen === "one" ? t + 1 : t, here = `Place ${t} of row ${b}, ${word(input_ids[b][t])}: `;
        if (cards[b][to]) cards[b][to].classList.add("live-answer");
        if (to >= cards[b].length) tell(said, null, `${here}nothing follows, so nothing is asked.`);
        else if (answer === IGNORE) tell(said, null, `${here}the label of place ${to} is −100, so nothing is asked.`);
        else tell(said, null, `${here}the logits are marked against the label of place ${to}, ${word(answer)}.`);
      }
    }
    draw();
  });

  // ---- decoding: 08_generation.html --------------------------------------------------

  // What the newest tokens look at: the number of the last image that each has passed.
  // kept, newest: (B, T) and (B, new), true at <image>; returns what is kept from now on.
  function count_per_row(kept, newest) { // as FlamingoLMMixin: the count goes on, row by row
    const whole = kept.map((row, b) => [...row, ...newest[b]]);
    return { kept: whole, time: whole.map((row) => text_time(row).slice(-newest[0].length)) };
  }

  function forgetful(kept, newest) { // as OpenFlamingo 2.0.1
    if (newest.some((row) => row.some(Boolean))) return { kept: newest, time: newest.map(text_time) };
    return { kept, time: kept.map((row, b) => newest[b].map(() => row.filter(Boolean).length)) };
  }

  // Rows of {prompt, writes} to the tokens of each row and, for a rule, the time of each.
  function decode(rows, rule) {
    const prompts = tokenize(rows.map((row) => row.prompt), "left"), written = rows.map((row) => split(row.writes));
    const tokens = prompts.input_ids.map((ids) => ids.map((id) => prompts.vocab[id]));
    const n_prompt = tokens[0].length, n_steps = Math.max(...written.map((row) => row.length));
    let kept = tokens.map((row) => row.map((word) => word === IMAGE));
    const times = kept.map(text_time);
    for (let step = 0; step < n_steps; step++) {
      const newest = written.map((row) => row[step] || PAD);
      const now = rule(kept, newest.map((word) => [word === IMAGE]));
      kept = now.kept;
      newest.forEach((word, b) => { tokens[b].push(word); times[b].push(now.time[b][0]); });
    }
    return { tokens, times, n_prompt, n_steps };
  }

  register("decoding", (root) => {
    const fields = [[`${IMAGE}`, `a lemon${EOC}${IMAGE}two owls${EOC}`], [`${IMAGE}a cow${EOC}${IMAGE}`, `a red apple above a tent${EOC}`]]
      .map((texts) => texts.map((value) => make("input", { type: "text", value, spellcheck: false, oninput: () => { step = 0; draw(); } })));
    const rule = choice("Where the images stood:", { row: "a count per row (this book)", forgetful: "the forgetful rule" }, draw);
    const back = button("Back", () => go(step - 1)), next = button("Next", () => go(step + 1), { className: "live-go" });
    const again = button("Start again", () => go(0)), said = status(), where = make("span"), place = make("div");
    let step = 0;
    root.append(rule, make("div", { className: "live-row" }, back, next, again, where), place, said,
      make("details", {}, make("summary", {}, "Other rows"), ...fields.map(([prompt, writes], b) =>
        make("div", {}, labelled(`Row ${b}: prompt`, prompt), labelled(`and what it writes`, writes)))),
      make("p", { className: "live-quiet" }, "In each card: a token, and the picture that it looks at, – for none. ✓ or ✗ says whether a recomputation of the whole row agrees. Words stand for tokens, <end> for <|endofchunk|>."));

    function go(to) {
      const focused = document.activeElement;
      step = to;
      draw();
      if (focused && focused.disabled) (next.disabled ? back : next).focus();
    }

    function draw() {
      const rows = fields.map(([prompt, writes]) => ({ prompt: prompt.value, writes: writes.value }));
      const is = rule.chosen === "row" ? count_per_row : forgetful, { tokens, times, n_prompt, n_steps } = decode(rows, is);
      const whole = tokens.map((row) => text_time(row.map((word) => word === IMAGE)));
      step = Math.max(0, Math.min(step, n_steps));
      const T = n_prompt + step, wrong = (b, t) => tokens[b][t] !== PAD && times[b][t] !== whole[b][t];
      back.disabled = again.disabled = step === 0;
      next.disabled = step === n_steps;
      where.textContent = `Step ${step} of ${n_steps}`;
      place.replaceChildren(...tokens.map((row, b) => {
        const cards = make("div", { className: "live-cards", role: "list", ariaLabel: `Row ${b}` });
        row.slice(0, T).forEach((word, t) => {
          const pads = word === PAD, looks = pads ? "" : times[b][t] ? String(times[b][t]) : "–", isNew = t >= n_prompt;
          const mark = pads || !isNew ? "" : wrong(b, t) ? " ✗" : " ✓";
          const look = !isNew || pads ? "" : wrong(b, t) ? "live-wrong" : "live-right";
          cards.append(make("div", { role: "listitem", className: `live-card ${isNew && t === T - 1 ? "live-chosen" : ""}` },
            make("span", { className: `live-token ${pads ? "live-quiet" : word === IMAGE ? "live-on" : ""}` }, short(word)), make("span", { className: look }, looks + mark)));
        });
        const last = row[T - 1] === PAD ? "has ended" : `its count stands at ${times[b][T - 1]}`;
        return make("div", {}, make("p", { className: "live-count" }, make("strong", {}, `Row ${b}`), `: ${last}`), cards);
      }));
      const newest = tokens.map((row) => row[T - 1]), image = newest.indexOf(IMAGE), bad = tokens.map((_, b) => b).filter((b) => step && wrong(b, T - 1));
      const fed = `Fed in this step: ${tokens.length} tokens; without a cache ${tokens.length * T}.`;
      const lost = bad.map((b) => (times[b][T - 1] ? `row ${b} takes picture ${times[b][T - 1]} for picture ${whole[b][T - 1]}` : `row ${b} has lost its picture`)).join("; ");
      if (!step) tell(said, null, "The prompts are read in one pass, the shorter one padded on the left. Now each step feeds one new token a row.");
      else if (bad.length && image >= 0) tell(said, false, `Row ${image} says ${IMAGE}. The positions of the new tokens replace those of the prompt, for all rows: ${lost}. ${fed}`);
      else if (bad.length) tell(said, false, `The prompt's positions are gone, and it stays wrong: ${lost}. ${fed}`);
      else if (image >= 0) tell(said, true, `Row ${image} says ${IMAGE}: its own count goes up by one, the other row's does not. ${fed}`);
      else tell(said, true, `Each new token looks where its row's count stands. ${fed}`);
    }
    draw();
  });

  Object.assign(window.liveFigures, {
    choice, labelled, status, tell,
    inside: { text_time, media_time, text_to_media_mask, read_masked, make_labels, shifted, tokenize, count_per_row, forgetful, decode },
  });
})();

// ---- budget: 12_real_one.html ----------------------------------------------------------
(function () {
  const { make, register, choice, labelled, status, tell } = window.liveFigures;
  const sum = (parts) => Object.values(parts).reduce((a, b) => a + b, 0);

  const TOWERS = { // open_clip's configurations, at 224 pixels
    "ViT-B-32": { d: 768, layers: 12, v: 49, patch: 32, out: 512 },
    "ViT-B-16": { d: 768, layers: 12, v: 196, patch: 16, out: 512 },
    "ViT-L-14": { d: 1024, layers: 24, v: 256, patch: 14, out: 768 },
    "ViT-H-14": { d: 1280, layers: 32, v: 256, patch: 14, out: 1024 },
  };
  const opt = (d, layers, heads) => ({ d, layers, ffn: 4 * d, heads, vocab: 50267, positions: 2050 });
  const MODELS = { // Zhang et al. 2022, table 1; OPT-350m is built in another way
    "OPT-125m": opt(768, 12, 12),
    "OPT-1.3b": opt(2048, 24, 32),
    "OPT-2.7b": opt(2560, 32, 32),
    "OPT-6.7b": opt(4096, 32, 32),
  };
  const GPUS = {
    T4: { memory: 16e9, precision: "float16", peak: 65e12 },
    L4: { memory: 24e9, precision: "bfloat16", peak: 121e12 },
    A100: { memory: 40e9, precision: "bfloat16", peak: 312e12 },
  };
  const ROOM = 0.9;

  function sizes_of(tower, model, cross_attn_every_n_layers = 1) {
    const lm = MODELS[model], number = Math.floor(lm.layers / cross_attn_every_n_layers);
    return {
      vision: TOWERS[tower],
      perceiver: { depth: 6, n: 64, inner: 512, heads: 8, ff: 4 },
      blocks: { number, inner: 512, heads: 8, ff: 4 },
      lm,
    };
  }

  function count_parameters({ vision, perceiver, blocks, lm }) {
    const d_img = vision.d, d_txt = lm.d;
    let tower = 3 * vision.patch ** 2 * d_img + d_img + (vision.v + 1) * d_img;
    tower += vision.layers * (12 * d_img ** 2 + 13 * d_img);
    tower += 4 * d_img + d_img * vision.out;

    let attention = 4 * d_img * perceiver.inner + 4 * d_img;
    let wide = 2 * perceiver.ff * d_img ** 2 + 2 * d_img;
    const resampler = perceiver.n * d_img + perceiver.depth * (attention + wide);

    attention = 2 * (d_txt + d_img) * blocks.inner + 2 * d_txt;
    wide = 2 * blocks.ff * d_txt ** 2 + 2 * d_txt;

    const layer = 4 * d_txt ** 2 + 2 * d_txt * lm.ffn + 9 * d_txt + lm.ffn;
    const rows = lm.vocab + lm.positions;
    return {
      "vision encoder": tower,
      "language model": rows * d_txt + lm.layers * layer + 2 * d_txt,
      perceiver: resampler + 2 * d_img,
      "gated blocks": blocks.number * (attention + wide + 2),
    };
  }

  const LARGE = 2 ** 20; // from so many numbers on, a GELU's output is not kept

  function kept_around_gelu(width, rows, n_rows) {
    return rows * width * (n_rows * width >= LARGE ? 1 : 2);
  }

  function kept_of_picture(sizes, half, pictures) { // of one frame
    return sizes.perceiver.depth * kept_of_reading(sizes, half, pictures) + kept_latents(sizes) + kept_tokens(sizes, half);
  }

  function kept_tokens({ vision }, half) { // standardised, once for all layers
    return half * vision.v * vision.d;
  }

  function kept_latents({ vision, perceiver }) { // before each layer but the first; at the end
    return 4 * perceiver.n * (perceiver.depth * vision.d + 2);
  }

  function kept_of_reading({ vision, perceiver }, half, pictures) { // by one layer of the Perceiver
    const { d, v: tokens } = vision, { n, inner } = perceiver;
    let products = n * d; // the latents, normalised
    products += (tokens + n) * 2 * inner; // keys, values
    products += 2 * n * inner; // queries; what was read
    products += n * d + kept_around_gelu(perceiver.ff * d, n, pictures * n);
    const norms = 4 * n + perceiver.heads * n; // means, spreads; softmax
    return half * products + 4 * (norms + n * d); // and the latents between the halves
  }

  function kept_media({ vision, perceiver, blocks }, T_img, half) {
    return half * T_img * perceiver.n * vision.d * (half === 4 ? 1 : blocks.number);
  }

  function kept_of_block({ perceiver, blocks, lm }, T_img, T_txt, half, B) {
    const d = lm.d, latents = T_img * perceiver.n, inner = blocks.inner;
    let products = T_txt * latents; // who may look, as numbers to be added
    products += 2 * latents * inner; // keys, values
    products += 3 * T_txt * inner; // queries; what was read; and without the blind rows
    products += 4 * T_txt * d; // the text, normalised, and what goes to the gate: twice
    products += kept_around_gelu(blocks.ff * d, T_txt, B * T_txt);
    const norms = 2 * T_txt * (d + 2) + blocks.heads * T_txt;
    return half * products + 4 * norms + T_txt;
  }

  function kept_of_layer({ lm }, T_txt, half) { // no inputs, as its matrices do not learn
    const products = 4 * T_txt * lm.d + T_txt * lm.ffn; // q, k, v, read; after ReLU
    return half * products + 4 * T_txt * (2 * (lm.d + 2) + lm.heads);
  }

  const bytesOf = (precision) => (precision === "float32" ? 4 : 2);

  function kept_for_backward(sizes, { T_img = 1, T_txt = 32, precision = "float32", B = 64 } = {}) {
    const half = bytesOf(precision), { blocks, lm } = sizes;
    return {
      perceiver: T_img * kept_of_picture(sizes, half, B * T_img),
      "gated blocks": blocks.number * kept_of_block(sizes, T_img, T_txt, half, B) + kept_media(sizes, T_img, half),
      "language model": lm.layers * kept_of_layer(sizes, T_txt, half) + T_txt * (8 + 4 * (lm.d + 2) + half * lm.d),
      loss: T_txt * (4 * lm.vocab + 8),
    };
  }

  function checkpointed(sizes, kept, T_img, T_txt, precision, B) {
    const half = bytesOf(precision), { vision, perceiver, lm } = sizes;
    const inputs = 4 * lm.layers * T_txt * lm.d, media = 4 * T_img * perceiver.n * vision.d;
    const tokens = kept_tokens(sizes, half) + kept_tokens(sizes, 4); // and the batch's
    const pictures = T_img * (kept_latents(sizes) + tokens);
    const reading = T_img * kept_of_reading(sizes, half, B * T_img);
    const one = Math.max(kept_of_block(sizes, T_img, T_txt, half, B) + kept_of_layer(sizes, T_txt, half), reading);
    return { perceiver: pictures, loss: kept.loss, "inputs of layers": inputs + media, "one layer": one };
  }

  function matrices({ vision, perceiver, blocks, lm }) { // numbers in what is multiplied with
    const layer = 4 * vision.d * perceiver.inner + 2 * perceiver.ff * vision.d ** 2;
    const block = 2 * (lm.d + vision.d) * blocks.inner + 2 * blocks.ff * lm.d ** 2;
    return { learning: perceiver.depth * layer + blocks.number * block, frozen: lm.layers * (4 * lm.d ** 2 + 2 * lm.d * lm.ffn) };
  }

  function memory_budget(sizes, settings = {}) {
    const { B = 1, T_img = 1, T_txt = 32, precision = "float32", with_muon = false, gradient_checkpointing = false, frozen_half = false } = settings;
    const counts = count_parameters(sizes), numbers = matrices(sizes), is_half = precision !== "float32";
    const table = sizes.lm.vocab * sizes.lm.d; // it has a gradient, as a whole
    const frozen = counts["vision encoder"] + counts["language model"], learning = counts.perceiver + counts["gated blocks"];
    const copied = numbers.learning + table + (frozen_half ? 0 : numbers.frozen);
    let kept = kept_for_backward(sizes, { T_img, T_txt, precision, B });
    if (gradient_checkpointing) kept = checkpointed(sizes, kept, T_img, T_txt, precision, B);
    return {
      "frozen weights": frozen * (frozen_half ? 2 : 4),
      "trained weights": 4 * learning,
      gradients: 4 * (learning + table),
      optimizer: 8 * (learning + table) - (with_muon ? 4 * numbers.learning : 0),
      "half copies": is_half ? 2 * copied : 0,
      "kept for backward": B * sum(kept),
      logits: B * T_txt * sizes.lm.vocab * (is_half ? 6 : 4),
    };
  }

  function disk(sizes, { n_pictures = 0, with_muon = false } = {}) {
    const counts = count_parameters(sizes), learning = counts.perceiver + counts["gated blocks"] + 2 * sizes.lm.d;
    const numbers = 3 * learning - (with_muon ? matrices(sizes).learning : 0);
    return {
      features: 2 * n_pictures * sizes.vision.v * sizes.vision.d,
      checkpoints: 2 * 4 * numbers,
      "saved model": 4 * learning,
    };
  }

  function largest_batch(memory, wanted, sizes, settings) { // [batch, how many to gather]; null: not even one fits
    for (let B = wanted; B > 0; B--) {
      if (wanted % B === 0 && sum(memory_budget(sizes, { ...settings, B })) <= ROOM * memory) return [B, wanted / B];
    }
    return null;
  }

  function arithmetic({ vision, perceiver, blocks, lm }, { T_img = 1, T_txt = 32 } = {}) {
    const d_img = vision.d, d = lm.d, v = vision.v, n = perceiver.n;
    let encode = 3 * vision.patch ** 2 * d_img * v + d_img * vision.out;
    encode += vision.layers * (12 * (v + 1) * d_img ** 2 + 2 * (v + 1) ** 2 * d_img);

    let inner = perceiver.inner, products = 2 * n * d_img * inner + n * d_img * 2 * inner;
    products += 2 * n * perceiver.ff * d_img ** 2;
    let reading = 2 * n * (v + n) * inner;
    const asked = v * d_img * 2 * inner; // visual tokens need no gradient
    let learning = T_img * perceiver.depth * (3 * products + 2 * asked + 3.5 * reading);

    const latents = T_img * n;
    inner = blocks.inner;
    products = 2 * T_txt * d * inner + latents * d_img * 2 * inner;
    products += 2 * T_txt * blocks.ff * d ** 2;
    reading = 2 * T_txt * latents * inner;
    learning += blocks.number * (3 * products + 3.5 * reading);

    const layer = T_txt * (4 * d ** 2 + 2 * d * lm.ffn);
    const frozen = lm.layers * (2 * layer + 3.5 * 2 * T_txt ** 2 * d), table = 3 * T_txt * d * lm.vocab;
    return { "encode a picture": 2 * encode, "train on a sequence": 2 * (learning + frozen + table) };
  }

  register("budget", (root) => {
    const select = (options, chosen) => make("select", { onchange: draw }, ...options.map((value) => make("option", { value, selected: value === chosen }, value)));
    const number = (value, max) => make("input", { type: "number", value, min: 1, max, step: 1, oninput: draw });
    const read = (field) => Math.round(Math.min(field.max, Math.max(field.min, Number(field.value) || 1)));
    const tower = select(Object.keys(TOWERS), "ViT-L-14"), model = select(Object.keys(MODELS), "OPT-125m");
    const every = select(["1", "2", "4"], "1"), gpu = select(Object.keys(GPUS), "T4");
    const T_img = number(1, 64), perPicture = number(32, 512), B = number(16, 1024), pictures = number(3000, 1e8), epochs = number(10, 1000);
    const precision = choice("Precision", { half: "half (autocast)", float32: "float32" }, draw);
    const optimizer = choice("Optimizer", { adamw: "AdamW", muon: "Muon" }, draw);
    const tick = (words) => make("label", {}, make("input", { type: "checkbox", onchange: draw }), " ", words);
    const checkpointing = tick("gradient checkpointing"), frozenHalf = tick("frozen parts in half");
    const said = status(), memory = make("div"), rest = make("div");
    root.append(
      make("div", { className: "live-row" }, labelled("CLIP", tower), labelled("Language model", model), labelled("a gated block every n layers, n =", every), labelled("GPU", gpu)),
      make("div", { className: "live-row" }, labelled("Images per sequence", T_img), labelled("tokens for each", perPicture), labelled("Batch", B)),
      make("div", { className: "live-row" }, labelled("Pictures", pictures), labelled("Epochs", epochs)),
      precision, optimizer, make("div", { className: "live-row" }, checkpointing, frozenHalf), said,
      make("div", { className: "live-two" }, memory, rest),
      make("p", { className: "live-quiet" }, "Memory is that of the fullest moment of a training step, by the formulas of this chapter. The times are what the arithmetic takes at the peak of the GPU's data sheet: no program reaches it, and yours will take longer."));

    const GB = (bytes) => `${(bytes / 1e9).toFixed(2)} GB`;
    const M = (n) => `${(n / 1e6).toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 })} M`;
    const time = (s) => (s < 1 ? `${(1000 * s).toFixed(0)} ms` : s < 120 ? `${s.toFixed(s < 10 ? 1 : 0)} s` : s < 7200 ? `${(s / 60).toFixed(1)} min` : `${(s / 3600).toFixed(1)} h`);
    const table = (title, rows) => make("table", {}, make("caption", {}, title), make("tbody", {}, ...rows));
    const line = (name, ...cells) => make("tr", {}, make("th", { scope: "row" }, name), ...cells.map((cell) => (cell instanceof Node ? make("td", { className: cell.matches(".live-bar") ? "live-barred" : "" }, cell) : make("td", {}, cell))));
    const bar = (share, look = "") => make("div", { className: `live-bar ${look}`, ariaHidden: "true", style: `width: ${(100 * share).toFixed(2)}%` });

    function draw() {
      const sizes = sizes_of(tower.value, model.value, Number(every.value)), card = GPUS[gpu.value], F = read(T_img);
      const settings = {
        T_img: F, T_txt: F * read(perPicture), precision: precision.chosen === "half" ? card.precision : "float32", with_muon: optimizer.chosen === "muon",
        gradient_checkpointing: checkpointing.firstChild.checked, frozen_half: frozenHalf.firstChild.checked,
      };
      const batch = read(B), parts = memory_budget(sizes, { ...settings, B: batch }), total = sum(parts), fits = total <= ROOM * card.memory;
      const top = Math.max(total, card.memory), best = largest_batch(card.memory, batch, sizes, settings);
      const rows = Object.entries(parts).map(([part, bytes]) => line(part, GB(bytes), bar(bytes / top)));
      rows.push(line(make("strong", {}, "all"), make("strong", {}, GB(total)), bar(total / top, fits ? "live-fits" : "live-over")));
      rows.push(line(`memory of the ${gpu.value}`, GB(card.memory), bar(card.memory / top, "live-card-has")));
      rows.forEach((row) => row.children[1].classList.add("live-number"));
      memory.replaceChildren(table(`Memory, ${settings.precision}, ${settings.T_txt} tokens a sequence`, rows));
      memory.firstChild.className = "live-memory";

      const counts = count_parameters(sizes), learning = counts.perceiver + counts["gated blocks"];
      const work = arithmetic(sizes, settings), n = read(pictures), onDisk = disk(sizes, { n_pictures: n, with_muon: settings.with_muon });
      const isHalf = settings.precision !== "float32", seconds = (flop) => (isHalf ? `> ${time(flop / card.peak)}` : "–");
      const other = [
        table("Parameters", [...Object.entries(counts).map(([part, count]) => line(part, M(count))), line("of these trained", M(learning))]),
        table(`On disk, for ${n.toLocaleString("en")} pictures`, Object.entries(onDisk).map(([part, bytes]) => line(part, GB(bytes)))),
        table(isHalf ? `At the peak of a ${gpu.value}` : "At the peak: known for half precision only", [
          line("encode all pictures, once", seconds(n * work["encode a picture"])),
          line("a step of one batch", seconds(batch * work["train on a sequence"])),
          line(`${read(epochs)} epochs, a sequence for each picture`, seconds(n * read(epochs) * work["train on a sequence"])),
        ]),
      ];
      other.forEach((one) => one.querySelectorAll("td").forEach((cell) => cell.classList.add("live-number")));
      rest.replaceChildren(...other);
      const share = `${GB(total)} of ${GB(card.memory)}, a tenth of which stays free`;
      if (fits) tell(said, true, `It fits: ${share}.`);
      else if (best) tell(said, false, `It does not fit: ${share}. What does: batches of ${best[0]}, and ${best[1]} of them gathered for a step (accumulate=${best[1]}).`);
      else tell(said, false, `It does not fit, and not even one sequence does: ${share}. Try half precision, gradient checkpointing, fewer images or another model.`);
    }
    draw();
  });

  Object.assign(window.liveFigures.inside, { TOWERS, MODELS, GPUS, sizes_of, count_parameters, kept_for_backward, memory_budget, disk, largest_batch, arithmetic });
})();
