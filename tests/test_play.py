"""The model in the browser: equal to Python's, offline, and a page that can be used.

In headless Chromium, from file://. It is found by CHROMIUM or on the PATH, and driven by
Playwright, which downloads nothing here.
"""

import base64
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "tools"))
import export_play

from flamingo_lite import (
    caption,
    check_text,
    load_captions,
    load_flamingo,
    make_prompt,
    make_scenes,
)
from flamingo_lite.fewshot import group_scenes, naming_episode
from flamingo_lite.plots import attention_maps

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
PLAIN = "<!doctype html><meta charset=utf-8><title>t</title><script src=flamingo.js></script>"


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
    for name in ("flamingo.js", "play.js", "book.css"):
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
        lambda m: m.type in ("error", "warning") and faults.append(f"console: {m.text}"),
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
        return found.map((x) => (typeof x === "string" ? x : x.map((r) => [...r]))); }}""",
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
    one, two = (tokenizer(f"{prompt}{t}<|endofchunk|>").input_ids for t in (mine, theirs))
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
