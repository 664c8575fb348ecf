"""The model in the browser: equal to Python's, offline, and a page that can be used.

In headless Chromium, from file://. It is found by CHROMIUM or on the PATH, and driven
by Playwright, which downloads nothing here.
"""

import base64
import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT))
from flamingo_lite import (
    caption,
    load_captions,
    load_flamingo,
    make_prompt,
    make_scenes,
    score_candidates,
)
from flamingo_lite.data import trim
from flamingo_lite.fewshot import group_scenes, naming_episode
from flamingo_lite.plots import attention_maps
from tools.book import export_play

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
CHROMIUM = CHROMIUM or shutil.which("google-chrome")
try:
    from playwright.sync_api import sync_playwright
except ImportError:
    sync_playwright = None
pytestmark = pytest.mark.skipif(
    not CHROMIUM or sync_playwright is None,
    reason="no Chromium (CHROMIUM or on the PATH) or no playwright: "
    "the model in the page is not tested",
)
STATIC = ROOT / "book" / "_static"
PLAIN = "<!doctype html><meta charset=utf-8><title>t</title>"
PLAIN += "<script src=flamingo.js></script>"


@pytest.fixture(scope="module")
def tiny():
    """The trained Flamingo, its image processor and its tokenizer."""
    return load_flamingo("tiny")


@pytest.fixture(scope="module")
def as_in_the_page(tiny):
    """The same with the weights that the page has."""
    model, *rest = load_flamingo("tiny")
    bits = export_play.bits_that_fit(model)
    written = export_play.written_tensors(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            key = name.replace("in_proj_", "in_proj.")
            if key in written:
                tensor.copy_(export_play.as_packed(written[key], bits))
    return model, *rest


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the script, the weights and an empty page."""
    folder = tmp_path_factory.mktemp("play")
    size, _ = export_play.write_weights(folder / "flamingo_weights.js")
    assert size <= 16_000_000
    for name in ("flamingo.js", "figures.js", "play.js", "book.css"):
        if (STATIC / name).is_file():
            shutil.copy(STATIC / name, folder)
    (folder / "plain.html").write_text(PLAIN)
    return folder


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


def watched(browser, address, width=1300, **context):
    """A page, and a list of what it asked the network for and complained about."""
    page = browser.new_page(viewport={"width": width, "height": 900}, **context)
    faults = []

    def request(asked):
        if not asked.url.startswith(("file:", "data:", "blob:")):
            faults.append(f"request: {asked.url}")

    page.on("request", request)
    page.on("pageerror", lambda error: faults.append(f"error: {error}"))
    page.on(
        "console",
        lambda m: (
            m.type in ("error", "warning") and faults.append(f"console: {m.text}")
        ),
    )
    page.goto(address)
    return page, faults


@pytest.fixture(scope="module")
def plain(browser, folder):
    """The empty page with the model loaded."""
    page, faults = watched(browser, (folder / "plain.html").as_uri())
    page.evaluate("async () => { await flamingoLite.ready; }")
    page.evaluate(
        """() => { window.picture = ([width, height, text]) => new ImageData(
        Uint8ClampedArray.from(atob(text), (c) => c.charCodeAt(0)), width, height); }"""
    )
    yield page
    assert not faults


def as_rgba(picture):
    """A PIL picture for `picture(...)` in the page: its very pixels."""
    rgba = picture.convert("RGBA")
    return [*rgba.size, base64.b64encode(rgba.tobytes()).decode()]


def in_page(page, call, rows):
    """[flamingoLite.call(images, prompt)] for rows of (pictures, prompt)."""
    given = [[[as_rgba(p) for p in pictures], prompt] for pictures, prompt in rows]
    return page.evaluate(
        f"""async (rows) => {{ const found = [];
        for (const [pictures, prompt] of rows)
          found.push(await flamingoLite.{call}(pictures.map(picture), prompt));
        return found.map((x) => Array.isArray(x) ? x.map((r) => [...r]) : x); }}""",
        given,
    )


@pytest.fixture(scope="module")
def scenes():
    """200 pictures: 20 things of each of the nine studios, and 20 held-out pairs."""
    rows = load_captions(ROOT / "data" / "emoji")
    found = []
    for studio in sorted({row["studio"] for row in rows}):
        own = [row for row in rows if row["studio"] == studio and row["named"]]
        found += make_scenes(own, 20, seed=7, pairs=0.25)
    known = [row for row in rows if row["named"]]
    return found + make_scenes(known, 20, seed=8, pairs=1.0, held_out=True)


@torch.no_grad()
def last_logits(model, image_processor, tokenizer, pictures, prompt):
    """(T_txt, vocab) in Python."""
    pixels = torch.stack([image_processor(p) for p in pictures])[None, :, None]
    lang_x = tokenizer(prompt, return_tensors="pt").input_ids
    return model(pixels, lang_x).logits[0]


def near_tie(parts, pictures, prompt, mine, theirs):
    """How far apart the two best logits are where two captions part."""
    tokenizer = parts[2]
    one, two = (
        tokenizer(f"{prompt}{t}<|endofchunk|>").input_ids for t in (mine, theirs)
    )
    place = next(i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
    logits = last_logits(*parts, pictures, f"{prompt}{theirs}")[place - 1]
    best = logits.topk(2).values
    return (best[0] - best[1]).item()


def compare(parts, found, rows, allowed):
    """At most 1 % of the captions differ from Python's, and those by a near tie."""
    pictures, prompts = [p for p, _ in rows], [prompt for _, prompt in rows]
    want = caption(*parts, pictures, prompts)
    apart = [i for i, (a, b) in enumerate(zip(found, want, strict=True)) if a != b]
    for i in apart:
        gap = near_tie(parts, *rows[i], found[i], want[i])
        print(f"{found[i]!r}, in Python {want[i]!r}: logits {gap:.4f} apart")
        assert gap < allowed, (found[i], want[i])
    print(f"{len(rows) - len(apart)} of {len(rows)} the same")
    assert len(apart) <= len(rows) * 0.01


def test_captions(plain, scenes, tiny, as_in_the_page):
    rows = [([scene["picture"]], "<image>") for scene in scenes]
    assert len(rows) == 200
    found = in_page(plain, "caption", rows)
    compare(as_in_the_page, found, rows, 1e-3)
    compare(tiny, found, rows, 0.05)


def few_shot_rows(n_ways, n=10):
    """Prompts with made-up words: (pictures, prompt)."""
    emoji = load_captions(ROOT / "data" / "emoji")
    unnamed = [row for row in emoji if not row["named"]]
    scenes = make_scenes(unnamed, 300, seed=11, pairs=0.0)
    rng, groups = np.random.default_rng(3), group_scenes(scenes)
    for _ in range(n):
        episode = naming_episode(rng, groups, n_ways, 1)
        pictures = [scenes[number]["picture"] for number in episode["numbers"]]
        yield pictures, make_prompt(episode["texts"][:-1])


def test_few_shot_prompts(plain, tiny, as_in_the_page):
    rows = [*few_shot_rows(2, n=12), *few_shot_rows(4, n=13)]
    found = in_page(plain, "caption", rows)
    compare(as_in_the_page, found, rows, 1e-3)
    compare(tiny, found, rows, 0.05)


def test_blanks_at_a_prompts_ends_change_nothing(plain, scenes, as_in_the_page):
    """A blank would be a token of its own, and the answer another one, as in Python."""
    pictures = [scene["picture"] for scene in scenes[::25]]
    bare = ["<image>question: what is this? answer:", "<image>a", "<image>", ""]
    rows = [
        ([p] * ("<" in b), f"\ufeff\n{b} \u200b\n ") for p in pictures for b in bare
    ]
    found = in_page(plain, "caption", rows)
    trimmed = [(given, trim(prompt)) for given, prompt in rows]
    assert found == in_page(plain, "caption", trimmed)
    compare(as_in_the_page, found, rows, 1e-3)


REFUSED = (
    ([], "no candidates to score"),
    (["a fox", " "], "candidate 2: the caption is empty or not a text"),
    ([""], "candidate 1: the caption is empty or not a text"),
    (["a <image>"], "candidate 1: take <image> out of the caption"),
    (["<|endofchunk|>"], "candidate 1: take <|endofchunk|> out of the caption"),
    (["a \ud800"], "candidate 1: the caption is not valid Unicode"),
)


@pytest.mark.parametrize(("candidates", "problem"), REFUSED)
def test_candidates_are_refused_as_in_python(plain, tiny, candidates, problem):
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}$"):
        score_candidates(*tiny, [], "a", candidates)
    js = """(texts) => flamingoLite.score_candidates([], "a", JSON.parse(texts))
    .catch((error) => error.message)"""
    assert plain.evaluate(js, json.dumps(candidates)) == problem


def test_scores_after_blanks(plain, scenes, as_in_the_page):
    """One after a word or a colon, none before the first word; no marks of no width."""
    picture, candidates = scenes[0]["picture"], ["a fox", " two lemons\u200b"]
    prompts = ["<image>answer:  ", "<image>answer:", "<image>answer", "<image>a fox."]
    prompts += ["<image> ", "\ufeff<image>", "<image>answer\ufeff", "  "]
    for prompt in prompts:
        pictures = [picture] * ("<" in prompt)
        js = """([pictures, prompt, texts]) =>
        flamingoLite.score_candidates(pictures.map(picture), prompt, texts)"""
        given = [[as_rgba(p) for p in pictures], prompt, candidates]
        found = torch.tensor(plain.evaluate(js, given))
        want = score_candidates(*as_in_the_page, pictures, prompt, candidates)
        torch.testing.assert_close(found, want, atol=2e-3, rtol=1e-4)


def test_loading_that_failed_on_the_way_goes_on(browser, folder):
    page, faults = watched(browser, (folder / "plain.html").as_uri())
    js = """async () => { let calls = 0; const said = [];
    const told = (what) => {
      if (what === "unpacking" && (calls += 1) === 2) throw new Error("no room");
    };
    await flamingoLite.load(told).catch((error) => said.push(error.message));
    const image = new ImageData(64, 64);
    said.push(await flamingoLite.caption([image], "<image>", { max_new_tokens: 2 }));
    return said; }"""
    said = page.evaluate(js)
    assert said[0] == "no room" and said[1] and not faults
    page.close()


def test_logits(plain, scenes, tiny, as_in_the_page):
    rows = [([s["picture"]], f"<image>{s['text']}<|endofchunk|>") for s in scenes[::20]]
    rows.append(([], "no picture at all"))
    rows.append(([scenes[0]["picture"]], "before <image> and after"))
    rows += few_shot_rows(3, n=3)
    found = in_page(plain, "logits", rows)
    apart = {"the same weights": 0.0, "the original": 0.0}
    for (pictures, prompt), logits in zip(rows, found, strict=True):
        for name, parts in zip(apart, (as_in_the_page, tiny), strict=True):
            if pictures:
                want = last_logits(*parts, pictures, prompt)
            else:
                lang_x = parts[2](prompt, return_tensors="pt").input_ids
                model, d_img = parts[0], parts[0].vis_dim
                nothing = torch.zeros(1, 1, 1, 64, d_img)
                with torch.no_grad():
                    want = model(None, lang_x, vision_features=nothing).logits[0]
            error = (torch.tensor(logits) - want).abs().max().item()
            apart[name] = max(apart[name], error)
    print(apart)
    assert apart["the same weights"] < 1e-3
    assert apart["the original"] < 0.1


TEXTS = (
    "a lemon to the left of a red apple",
    "<image>question: how many? answer: two<|endofchunk|><image>",
    "it's  a   dax,\n\n 12 Éclairs (naïve) don't; 日本 🦩 end ",
    "</s>mid<unk>dle <image> x",
    "",
)


def test_tokenizer(plain, tiny):
    for text in TEXTS:
        want = tiny[2](text).input_ids
        found = plain.evaluate("(text) => flamingoLite.inside.encode(text)", text)
        assert found == want, text
        back = plain.evaluate("(ids) => flamingoLite.inside.decode(ids)", want)
        assert back == tiny[2].decode(want, skip_special_tokens=True)


@pytest.mark.parametrize(
    "size", [(64, 64), (300, 200), (37, 150), (20, 20), (640, 64), (64, 99)]
)
def test_resizing_is_pillows(plain, tiny, size):
    """Pixels of any size, given as ImageData, become the very bytes of Pillow's."""
    rng = np.random.default_rng(sum(size))
    noise = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    picture = noise.resize(size, Image.Resampling.BICUBIC)
    js = "(p) => [...flamingoLite.inside.image_processor(picture(p))]"
    found = np.array(plain.evaluate(js, as_rgba(picture))).reshape(64, 64, 3)
    want = ((tiny[1](picture).permute(1, 2, 0) * 0.5 + 0.5) * 255).round().numpy()
    assert (found == want).all()


def test_transparency_is_on_white(plain):
    """Every brightness with every alpha, to one step; Pillow rounds the same way."""
    value, alpha = np.meshgrid(np.arange(256), np.arange(256))
    rgba = np.stack([value, value, value, alpha], axis=-1).astype(np.uint8)
    picture = Image.fromarray(rgba, "RGBA")
    js = "(p) => [...flamingoLite.inside.rgb_on_white(picture(p)).data]"
    found = np.array(plain.evaluate(js, as_rgba(picture))).reshape(256, 256, 3)
    white = Image.new("RGBA", picture.size, "white")
    want = np.asarray(Image.alpha_composite(white, picture).convert("RGB")).astype(int)
    assert abs(found - want).max() == 0


def test_an_image_file_with_transparency(plain, tiny):
    """A WebP through <img> and canvas: at most 2 of 255 from Pillow, after resizing."""
    from flamingo_lite.data import read_picture

    path = ROOT / "data" / "emoji" / "twemoji" / "fox.webp"
    src = "data:image/webp;base64," + base64.b64encode(path.read_bytes()).decode()
    js = """async (src) => { const image = new Image(); image.src = src;
    await image.decode(); return [...flamingoLite.inside.image_processor(image)]; }"""
    found = np.array(plain.evaluate(js, src)).reshape(64, 64, 3)
    pixels = tiny[1](read_picture(path)).permute(1, 2, 0).numpy()
    assert abs(found - (pixels * 0.5 + 0.5) * 255).max() < 2.5


def test_maps_are_those_of_chapter_11(plain, scenes, as_in_the_page):
    model, image_processor, tokenizer = as_in_the_page
    pictures = [scenes[0]["picture"], scenes[1]["picture"]]
    prompt = "<image>a dax<|endofchunk|><image>"
    js = """async ([pictures, prompt]) => { const maps = [];
    await flamingoLite.caption(pictures.map(picture), prompt, { max_new_tokens: 1,
      onToken: (token) => { if (!token.written)
        maps.push(token.maps.map((b) => b.map((h) => h.map((x) => [...x])))); } });
    return maps; }"""
    found = plain.evaluate(js, [[as_rgba(p) for p in pictures], prompt])
    pixels = torch.stack([image_processor(p) for p in pictures])[None, :, None]
    with torch.no_grad():
        features = model.vision_encoder(pixels[0, :, 0])[1][None, :, None]
    lang_x = tokenizer(prompt, return_tensors="pt").input_ids
    maps = attention_maps(model, {"vision_features": features, "lang_x": lang_x})
    want = torch.stack([layer[0] for layer in maps])  # (layers, h, T_txt, T_img, v)
    want = want.permute(2, 0, 1, 3, 4)
    torch.testing.assert_close(torch.tensor(found), want, atol=1e-5, rtol=1e-4)


def test_shut_gates_are_the_language_model(plain, scenes, as_in_the_page):
    model, _, tokenizer = as_in_the_page
    ids = tokenizer("<image>a lemon", return_tensors="pt").input_ids
    js = """async (p) => { const rows = await flamingoLite.logits([picture(p)],
    "<image>a lemon", { gates: 0 }); return rows.map((row) => [...row]); }"""
    found = [plain.evaluate(js, as_rgba(scenes[i]["picture"])) for i in (0, 1)]
    assert found[0] == found[1]
    gates = [p for n, p in model.named_parameters() if n.endswith("_gate")]
    kept = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.zero_()
        nothing = torch.zeros(1, 1, 1, 64, model.vis_dim)
        want = model(None, ids, vision_features=nothing).logits[0]
        for gate, value in zip(gates, kept, strict=True):
            gate.copy_(value)
    torch.testing.assert_close(torch.tensor(found[0]), want, atol=1e-3, rtol=0)


def test_pictures_and_places_must_agree(plain, scenes):
    js = """async (p) => { try {
      await flamingoLite.caption([picture(p)], "<image><image>"); }
    catch (error) { return error.message; } }"""
    said = plain.evaluate(js, as_rgba(scenes[0]["picture"]))
    assert said == "1 pictures, but 2 <image> in the prompt"


BARE = """<!doctype html><html lang=en><meta charset=utf-8><title>Play</title>
<meta name=viewport content="width=device-width"><link rel=stylesheet href=book.css>
<main><h1>Play</h1><div id=play class=play hidden></div></main>
<script src=flamingo.js></script><script src=figures.js></script>
<script src=play.js></script></html>"""


@pytest.fixture(scope="module", params=["bare", "rendered"])
def address(request, folder):
    """The page's scripts in an empty page, and the book's page if it is rendered."""
    if request.param == "bare":
        (folder / "bare.html").write_text(BARE)
        return (folder / "bare.html").as_uri()
    html = ROOT / "_build" / "html"
    page, ours = html / "book" / "play.html", ("flamingo.js", "figures.js", "play.js")
    same = page.is_file() and all(
        (html / "_static" / name).read_bytes() == (STATIC / name).read_bytes()
        for name in ours
    )
    if not same:
        pytest.skip("the book is not rendered from these scripts: tools/book/build.py")
    return page.as_uri()


DONE = "document.querySelector('#play').dataset.state === 'done'"


def opened(browser, address, width, **context):
    page, faults = watched(browser, address, width, **context)
    page.click("#play .play-start")
    page.wait_for_selector("#play[data-state=done]", timeout=120_000)
    return page, faults


@pytest.mark.parametrize("width", [390, 1300])
def test_with_a_mouse(browser, address, width):
    page, faults = opened(browser, address, width)
    said = page.locator(".play-answer")
    first = said.inner_text()
    assert first

    def then(selector):
        page.click(selector)
        page.wait_for_function(DONE, timeout=60_000)
        assert page.locator("#play > .play-said").inner_text() == ""
        return said.inner_text()

    answers = {then(f"#play .play-drawings button >> nth={i}") for i in (3, 9, 15)}
    assert len(answers) == 3
    then("text=Another picture")
    assert then("text=Two new words") == "a dab"
    assert page.locator(".play-slots button").count() == 3
    chips = page.locator(".play-tokens button.play-written")
    chips.first.hover()
    assert page.locator(".play-slots button.play-faded").count() == 2
    lit = """() => [...document.querySelectorAll(".play-heat")].map((canvas) =>
      canvas.getContext("2d").getImageData(0, 0, 64, 64).data.some((x) => x > 0))"""
    assert page.evaluate(lit) == [False, False, True]
    then("text=Shuffled")
    page.locator("#play-gates").fill("0")
    page.wait_for_function(DONE, timeout=60_000)
    shut = said.inner_text()
    assert then("text=Shuffled") == shut == then("text=Another picture")
    page.set_input_files("#play-file", ROOT / "data/emoji/twemoji/lemon.webp")
    page.wait_for_function(DONE, timeout=60_000)
    page.click("text=Draw one")
    box = page.locator(".play-canvas").bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 150, box["y"] + 150)
    page.mouse.up()
    then("text=Use this drawing")
    sideways = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(sideways)
    assert not faults
    page.close()


def test_with_the_keyboard_alone(browser, address):
    page, faults = watched(browser, address)
    where = "document.activeElement.textContent || document.activeElement.id"

    def tab_to(text, most=200):
        for _ in range(most):
            if page.evaluate(where).strip().startswith(text):
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"Tab does not reach {text!r}")

    tab_to("Load the model")
    page.keyboard.press("Enter")
    page.wait_for_selector("#play[data-state=done]", timeout=120_000)
    tab_to("Three new words")
    page.keyboard.press("Enter")
    page.wait_for_function(DONE, timeout=60_000)
    tab_to("play-prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("<image>question: what is this? answer:")
    tab_to("Write")
    page.keyboard.press("Space")
    page.wait_for_function(DONE, timeout=60_000)
    assert page.locator(".play-answer").inner_text()
    tab_to("play-gates")
    page.keyboard.press("Home")
    page.wait_for_function(DONE, timeout=60_000)
    assert "plain language model" in page.inner_text(".play-gates")
    unnamed = """() => {
      const kinds = "#play :is(button, input, select, textarea)";
      const all = document.querySelectorAll(kinds);
      return [...all].filter((e) => !e.textContent.trim() && !e.ariaLabel &&
        !(e.labels && e.labels.length)).length; }"""
    assert page.evaluate(unnamed) == 0
    assert not faults
    page.close()


def test_nothing_is_loaded_before_a_click(browser, address):
    page, faults = watched(browser, address)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    assert not any("flamingo_weights" in url for url in asked)
    assert not faults
    page.close()
