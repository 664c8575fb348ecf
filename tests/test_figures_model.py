"""The figures that ask the trained model answer, and say what Python says.

In headless Chromium, from file://, in empty pages and in the rendered chapters.
"""

import base64
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import test_play
import torch
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT))
from flamingo_lite import build_flamingo, caption, collate, score_candidates
from flamingo_lite.plots import attention_maps
from flamingo_lite.training import caption_losses
from tools.book import export_play
from tools.weights import lessons

tiny, as_in_the_page = test_play.tiny, test_play.as_in_the_page
STATIC = ROOT / "book" / "_static"
CHAPTERS = {
    "training": "09_training",
    "prompt": "10_few_shot",
    "look": "11_looking_inside",
}
BARE = """<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title>
<meta name=viewport content="width=device-width">
<link rel=stylesheet href=figures.css><main><h1>{name}</h1>
<div class=live data-figure={name}><img alt="the still picture" src="{still}"></div>
</main><script src=figures.js></script><script src=figures_model.js></script></html>"""
STILL = "data:image/gif;base64,R0lGODlhAQABAAAAACw="
LOAD = "text=Load the model"
DONE = ".live-figure[data-state=done]"
RUNS = [
    {"name": "one", "looks": [{"step": 0, "true": 4.5, "shuffled": 4.5},
                              {"step": 50, "true": 1.25, "shuffled": 2.5},
                              {"step": 90, "true": 0.5, "shuffled": 3.0}]},
    {"name": "two", "looks": [{"step": 200, "true": 0.75, "shuffled": 4.0}]},
]  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, or one line that says what is not tested."""
    if not test_play.CHROMIUM or test_play.sync_playwright is None:
        pytest.skip("no Chromium or no playwright: the figures are not tested")
    with test_play.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=test_play.CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the scripts, the weights, curves of two runs and empty pages."""
    folder = tmp_path_factory.mktemp("figures")
    export_play.write_weights(folder / "flamingo_weights.js")
    text = f"window.flamingoCurves = {json.dumps(RUNS)};"
    (folder / "flamingo_curves.js").write_text(text)
    for file in STATIC.iterdir():
        if file.suffix in (".js", ".css"):
            shutil.copy(file, folder)
    for name in CHAPTERS:
        (folder / f"{name}.html").write_text(BARE.format(name=name, still=STILL))
    return folder


@pytest.fixture(scope="module", params=["bare", "rendered"])
def address(request, folder):
    """Where a figure's page is: a function of its name."""
    if request.param == "bare":
        return lambda name: (folder / f"{name}.html").as_uri()
    html = ROOT / "_build" / "html"

    def of_chapter(name):
        page = html / "book" / f"{CHAPTERS[name]}.html"
        same = all(
            (html / "_static" / script).is_file()
            and (html / "_static" / script).read_bytes() == file.read_bytes()
            for script in ("flamingo.js", "figures_model.js")
            for file in [STATIC / script]
        )
        if not (same and page.is_file() and f'figure="{name}"' in page.read_text()):
            pytest.skip(
                "the book is not rendered from these scripts: tools/book/build.py"
            )
        return page.as_uri()

    return of_chapter


def opened(browser, address, width=1300):
    """A page whose figure has loaded the model after a click."""
    page, faults = test_play.watched(browser, address, width)
    page.click(LOAD)
    page.wait_for_selector(DONE, timeout=120_000)
    return page, faults


def shown(page):
    """What the figure shows now, once it is done."""
    page.wait_for_selector(DONE, timeout=60_000)
    return page.evaluate("document.querySelector('.live-figure').shows")


def pictures(page, selector):
    """The very pixels that the page gives to the model: PIL pictures."""
    js = """(all) => all.map((image) => {
      const { width, height, data } = flamingoLite.inside.rgb_on_white(image);
      return [width, height, btoa(String.fromCharCode(...data))]; })"""
    return [
        Image.frombytes("RGB", (width, height), base64.b64decode(data))
        for width, height, data in page.locator(selector).evaluate_all(js)
    ]


def tab_to(page, what, most=150):
    """Go forward with Tab to the element that fits a selector."""
    for _ in range(most):
        page.keyboard.press("Tab")
        if page.evaluate("(what) => document.activeElement.matches(what)", what):
            return
    raise AssertionError(f"Tab does not reach {what}")


def close(page, faults):
    """At the end of a test: nothing was asked of the network, nothing complained."""
    assert not faults
    sideways = "document.documentElement.scrollWidth > innerWidth"
    assert not page.evaluate(sideways)
    page.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_nothing_is_loaded_before_a_click(browser, address, name):
    page, faults = test_play.watched(browser, address(name))
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.reload()
    page.wait_for_selector(LOAD)
    assert not any("flamingo_weights" in url for url in asked)
    close(page, faults)


# ------------------------------------------------------------------- chapter 9


def test_the_slider_goes_along_the_losses(browser, folder):
    page, faults = test_play.watched(browser, (folder / "training.html").as_uri())
    slider, said = page.locator("#live-step"), page.locator("output")
    slider.press("Home")
    assert page.evaluate("document.querySelector('.live-figure').shows.look.step") == 0
    slider.press("ArrowRight")
    assert said.inner_text().startswith("Step 50: 1.25 beside their own pictures, 2.50")
    assert said.inner_text().endswith("worth 1.25.")
    page.select_option("#live-run", label="two")
    assert said.inner_text().startswith("Step 200: 0.75")
    box = slider.bounding_box()
    page.select_option("#live-run", label="one")
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    assert said.inner_text().startswith("Step 90: 0.50")
    close(page, faults)


def test_the_losses_are_those_that_the_chapter_printed(tmp_path):
    cells = [
        "step     1 of 280  loss 5.065  true 4.689  shuffled 4.689  18 pictures/s\n"
        "step   120 of 280  loss 1.092  true 1.012  shuffled 2.169  58 pictures/s\n",
        "step   0  own 4.70  another 4.71\nstep   1  own 4.69  another 4.69\n",
        "trained studios true 0.21  shuffled 2.56  blank 2.70  gates shut 3.31\n",
    ]
    outputs = [{"outputs": [{"text": [text]}]} for text in cells]
    notebook, looks = tmp_path / "09.ipynb", tmp_path / "looks.json"
    notebook.write_text(json.dumps({"cells": [{}, *outputs]}))
    found = export_play.curves(notebook, looks)
    assert [run["name"] for run in found] == ["this page's run"]
    assert found[0]["looks"] == [
        {"step": 0, "true": 4.70, "shuffled": 4.71},
        {"step": 1, "true": 4.69, "shuffled": 4.69},
        {"step": 120, "true": 1.012, "shuffled": 2.169},
    ]
    looks.write_text(json.dumps(RUNS[0]["looks"]))
    assert export_play.curves(notebook, looks)[1]["looks"] == RUNS[0]["looks"]
    notebook.write_text(json.dumps({"cells": []}))
    assert len(export_play.curves(notebook, looks)) == 1


def test_a_training_of_lessons_notes_its_looks(tmp_path, monkeypatch, capsys):
    """Beside its checkpoints; what a killed training noted twice counts once."""
    built = build_flamingo("tiny")
    features, texts = lessons.probe(*built[:2], n=8)
    monkeypatch.setattr(lessons, "make_lessons", lambda *_: (features, texts, None))
    monkeypatch.setattr(lessons, "probe", lambda *_: (features, texts))
    args = {
        "steps": 2,
        "batch_size": 4,
        "lr": 1e-3,
        "seed": 0,
        "precision": "float32",
        "hands": False,
    }
    looks = tmp_path / "looks.jsonl"
    looks.write_text('{"step": 7, "true": 1.0, "shuffled": 1.0}\n')  # of another
    lessons.teach(built, {}, 0, 1, SimpleNamespace(**args, checkpoints=tmp_path))
    found = lessons.read_looks(looks)
    assert [look["step"] for look in found] == [1, 2]
    printed = re.findall(r"true ([\d.]+)  shuffled ([\d.]+)", capsys.readouterr().out)
    for look, said in zip(found, printed, strict=True):  # both are rounded
        noted = [look["true"], look["shuffled"]]
        assert noted == pytest.approx([float(x) for x in said], abs=6e-4)
    with looks.open("a") as file:
        file.write('{"step": 1, "true": 5.0, "shuffled": 6.0}\n')
    again = lessons.read_looks(looks)
    assert [look["step"] for look in again] == [1, 2]
    assert again[0]["true"] == 5.0
    assert lessons.read_looks(tmp_path / "nothing.jsonl") == []


def test_the_book_has_a_curve():
    """The stored outputs of chapter 9 still have the lines that the figure reads."""
    path = ROOT / "book" / "09_training.ipynb"
    assert "pictures/s" in path.read_text(), "chapter 9 is stored without its outputs"
    looks = export_play.curves(path, ROOT / "data" / "nothing.json")[0]["looks"]
    assert len(looks) >= 5
    assert looks[-1]["shuffled"] > looks[-1]["true"] + 0.5


def loss_in_python(parts, picture, text):
    model, image_processor, tokenizer = parts
    with torch.no_grad():
        features = model.vision_encoder(image_processor(picture)[None])[1][:, None]
        return caption_losses(model, tokenizer, features, [text]).item()


@pytest.mark.parametrize("width", [390, 1300])
def test_another_picture_above_a_caption(browser, address, as_in_the_page, width):
    page, faults = opened(browser, address("training"), width)

    def compare():
        found = shown(page)
        (other,) = pictures(page, ".model-large img")
        title = found["caption"]
        (own,) = pictures(page, f'.model-pictures button[title="{title}"] img')
        for mine, picture in (("own", own), ("other", other)):
            want = loss_in_python(as_in_the_page, picture, found["caption"])
            assert found[mine] == pytest.approx(want, abs=1e-2), (mine, found)
        assert f"{found['other']:.2f}" in page.inner_text(".model-answer")
        return found

    first = compare()
    assert first["other"] > first["own"] + 0.3  # the model looks
    page.click(".model-pictures button >> nth=5")
    second = compare()
    assert second["picture"] != first["picture"]
    assert second["own"] == first["own"]
    page.locator("#live-caption").focus()
    page.keyboard.press("ArrowDown")
    third = compare()
    assert third["caption"] != first["caption"]
    page.keyboard.press("Tab")  # to "Its own picture"
    page.keyboard.press("Enter")
    fourth = compare()
    assert fourth["own"] == fourth["other"]
    close(page, faults)


# ------------------------------------------------------------------ chapter 10


@pytest.mark.parametrize("width", [390, 1300])
def test_a_prompt_to_build(browser, address, as_in_the_page, width):
    page, faults = opened(browser, address("prompt"), width)

    def compare():
        found = shown(page)
        given = pictures(page, ".model-card img")
        assert found["prompt"].count("<image>") == len(given)
        (want,) = caption(*as_in_the_page, [given], [found["prompt"]], max_new_tokens=8)
        assert found["written"] == want
        assert page.inner_text(".model-answer") == f"It writes: {want}"
        scores = score_candidates(
            *as_in_the_page, given, found["prompt"], found["candidates"]
        )
        torch.testing.assert_close(
            torch.tensor(found["scores"]), scores, atol=1e-2, rtol=1e-3
        )
        return found

    first = compare()
    assert set(first["candidates"]) >= {"a guf", "a dab"}
    page.click(".live button >> text=Shuffled texts")
    assert compare()["prompt"].startswith("<image>a dab<|endofchunk|><image>a guf")
    page.click(".live button >> text=As it was")
    assert compare() == first
    page.click(".model-place >> nth=0")
    page.click(".model-all button >> nth=4")
    swapped = compare()
    assert swapped["pictures"][0] != first["pictures"][0]
    assert swapped["pictures"][1:] == first["pictures"][1:]
    page.locator(".model-card input").first.focus()
    page.keyboard.press("Control+A")
    page.keyboard.type("a wug")
    assert compare()["prompt"].startswith("<image>a wug<|endofchunk|>")
    page.keyboard.press("Control+A")
    page.keyboard.press("Delete")
    page.wait_for_selector("text=Demonstration 1 has no text: type one.")
    page.click(".live button >> text=Three new words")
    three = compare()
    page.click(".live button >> text=Wrong pictures")
    assert not set(compare()["pictures"][:3]) & set(three["pictures"])
    close(page, faults)


# ------------------------------------------------------------------ chapter 11


@pytest.mark.parametrize("width", [390, 1300])
def test_where_a_word_looks(browser, address, as_in_the_page, width):
    page, faults = opened(browser, address("look"), width)
    model, image_processor, tokenizer = as_in_the_page

    def compare(layer=None, head=None):
        found = shown(page)
        (picture,) = pictures(page, ".model-large img")
        with torch.no_grad():
            features = model.vision_encoder(image_processor(picture)[None])[1]
        batch = collate([(features[:, None], [found["caption"]])], tokenizer)
        maps = torch.stack(attention_maps(model, batch))[:, 0, :, :, 0]
        # maps: (layers, h, T_txt, v); a word is predicted from the token before it
        before = found["caption"].split()[: found["number"]]
        ids = tokenizer(f"<image>{' '.join(before)}").input_ids
        maps = maps[:, :, len(ids) - 1]
        maps = maps if layer is None else maps[layer - 1 : layer]
        maps = maps if head is None else maps[:, head - 1 : head]
        want = maps.mean(dim=(0, 1))  # (v,)
        torch.testing.assert_close(torch.tensor(found["map"]), want, atol=1e-3, rtol=0)
        painted = page.evaluate(
            """() => { const canvas = document.querySelector(".model-large canvas");
            const side = canvas.width, ink = canvas.getContext("2d");
            return [...ink.getImageData(0, 0, side, side).data]; }"""
        )
        alpha = torch.tensor(painted[3::4]) / 235  # the most of it is 1
        torch.testing.assert_close(alpha, want / want.max(), atol=1e-2, rtol=0)
        return found

    first = compare()
    page.hover(".model-words button >> nth=0")
    second = compare()
    assert second["number"] == 0
    page.locator(".model-words button").nth(0).focus()
    page.keyboard.press("Tab")
    third = compare()
    assert third["number"] == 1
    page.keyboard.press("Tab")
    assert compare()["map"] != third["map"]
    page.select_option("#live-block", label="3")
    one = compare(layer=3)
    page.locator("#live-head").focus()
    page.keyboard.press("ArrowDown")
    assert compare(layer=3, head=1)["map"] != one["map"]
    page.click(".model-pictures button >> nth=4")
    assert compare(layer=3, head=1)["picture"] != first["picture"]
    page.fill("#live-text", "a dax below a saxophone")
    page.wait_for_selector(".model-words button:text('saxophone')")
    compare(layer=3, head=1)
    page.click(".live button >> text=What the model writes")
    page.wait_for_function(
        "!document.querySelector('#live-text').value.includes('dax')"
    )
    compare(layer=3, head=1)
    close(page, faults)


@pytest.mark.parametrize("name", CHAPTERS)
def test_with_the_keyboard_alone(browser, address, name):
    page, faults = test_play.watched(browser, address(name))
    page.wait_for_selector(LOAD)
    page.locator(".live-figure").evaluate("(x) => { x.tabIndex = -1; x.focus(); }")
    tab_to(page, "button.live-go")
    page.keyboard.press("Enter")
    page.wait_for_selector(DONE, timeout=120_000)
    assert page.evaluate("document.activeElement.closest('.live-figure') !== null")
    before = shown(page)
    tab_to(page, ".model-pictures button:nth-child(3)")
    page.keyboard.press("Space")
    page.wait_for_selector(DONE, timeout=60_000)
    assert shown(page) != before
    unnamed = """() => {
      const kinds = ".live-figure :is(button, input, select, textarea)";
      const all = document.querySelectorAll(kinds);
      return [...all].filter((e) => !e.textContent.trim() && !e.ariaLabel &&
        !(e.labels && e.labels.length)).length; }"""
    assert page.evaluate(unnamed) == 0
    close(page, faults)
