"""The figures that answer: what they compute equals Python's, and they can be used.

In headless Chromium, from file://, each on a small page with the book's own looks. It
is found by CHROMIUM or on the PATH, and driven by Playwright, which downloads nothing.
"""

import itertools
import math
import re
import sys
from types import SimpleNamespace

import nbformat
import open_clip
import pytest
import torch
from conftest import ROOT
from docutils import nodes
from docutils.utils import new_document
from figure_pages import IMAGES, MOVES, NAMES, SCRIPT, STATIC, small_page
from open_clip.transformer import VisionTransformer
from test_pages import CONTRAST, HTML, OVER, rendered  # noqa: F401
from test_play import CHROMIUM, sync_playwright, watched
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

from flamingo_lite import budget, make_labels, text_time, text_to_media_mask
from flamingo_lite.loss import IGNORE

sys.path.insert(0, str(ROOT / "book" / "_ext"))
import flamingo_book

CHAPTERS = {"mask": "03", "labels": "06", "decoding": "08", "budget": "12"}
IMAGE, EOC = "<image>", "<|endofchunk|>"


# ----------------------------------------------------------------------- sources


def test_every_figure_has_a_chapter():
    assert set(CHAPTERS) == set(NAMES) and set(MOVES) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_stands_in_its_chapter_with_a_small_still(name):
    (path,) = (ROOT / "book").glob(f"{CHAPTERS[name]}_*.ipynb")
    cells = [c.source for c in nbformat.read(path, as_version=4).cells]
    (cell,) = (source for source in cells if f"images/figure_{name}.png" in source)
    picture, caption = cell.split("\n\n")
    alt = re.fullmatch(rf"!\[(.+)\]\(\S*images/figure_{name}\.png\)", picture)[1]
    assert len(alt) > 40 and caption[-1] in ".?"
    assert (IMAGES / f"figure_{name}.png").stat().st_size < 120_000


def test_below_every_still_stands_where_it_answers():
    """In one form, for a notebook shows the still alone."""
    below = [
        cell.source.rpartition(".png)")[2].split()
        for path in sorted((ROOT / "book").glob("[0-9A-Z]*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells
        if "images/figure_" in cell.source
    ]
    assert len(below) >= len(CHAPTERS)
    says = "In the rendered book you can use this figure:"
    assert {" ".join(words[:9]) for words in below} == {says}


def resolved(uri, builder="html"):
    """What the extension makes of a page with a word and one picture."""
    page = new_document("a page")
    page += nodes.paragraph("", "a word")
    page += nodes.paragraph("", "", nodes.image(uri=uri, alt="the still"))
    app = SimpleNamespace(builder=SimpleNamespace(format=builder))
    flamingo_book.live_figures(app, page, "book/03_cross_attention")
    return page


def test_a_picture_becomes_a_figure():
    page = resolved("book/images/figure_mask.png")
    _, opened, image, closed, scripts = page.children
    assert opened.astext() == '<div class="live" data-figure="mask">'
    assert image["alt"] == "the still" and closed.astext() == "</div>"
    assert 'src="../_static/figures.js"' in scripts.astext()
    assert "figures_model.js" not in scripts.astext()


def test_other_pictures_and_other_books_stay_as_they_are():
    for uri, builder in (
        ("images/cover.png", "html"),
        ("images/figure_a.png", "latex"),
    ):
        assert "raw" not in str(resolved(uri, builder))


# --------------------------------------------------------------------- Chromium


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM or sync_playwright is None:
        pytest.skip("no Chromium or no playwright: the figures are not tested")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("figures")


@pytest.fixture
def opened(browser, folder):
    """A function that opens a figure's page; at the end it must not have complained."""
    pages = []

    def open_one(name, mode="light", **settings):
        page, faults = watched(
            browser, small_page(name, folder, mode).as_uri(), **settings
        )
        pages.append((page, faults))
        return page

    yield open_one
    for page, faults in pages:
        page.close()
        assert not faults


@pytest.fixture(scope="module")
def inside(browser, folder):
    """A function that calls one of the script's own: inside("text_time", row)."""
    page, faults = watched(browser, small_page("mask", folder).as_uri())

    def call(name, *arguments):
        return page.evaluate(
            f"(given) => liveFigures.inside.{name}(...given)", list(arguments)
        )

    call.page = page
    yield call
    page.close()
    assert not faults


# ------------------------------------------------- the same numbers as in Python


def test_times_and_masks(inside):
    torch.manual_seed(0)
    for share in (0.0, 0.2, 0.5, 1.0):
        locations = torch.rand(1, 9) < share  # (B, T_txt)
        T_img, row = int(locations.sum()), locations[0].tolist()
        assert inside("text_time", row) == text_time(locations)[0].tolist()
        assert inside("media_time", T_img) == list(range(1, T_img + 1))
        for only in (True, False):
            mask = text_to_media_mask(locations, T_img, only)  # (B, T_txt, T_img)
            assert inside("text_to_media_mask", row, T_img, only) == mask[0].tolist()


@pytest.mark.parametrize("fill", ["-inf", "lowest", "blanked"])
@pytest.mark.parametrize("only", [True, False])
def test_what_is_read_behind_the_mask(inside, fill, only):
    locations = torch.tensor([[0, 0, 1, 0, 1, 1, 0]]).bool()  # (B, T_txt)
    may_look = text_to_media_mask(locations, 3, only)[0]  # (T_txt, T_img)
    values = torch.tensor([10.0, 20.0, 30.0])  # (T_img,)
    lowest = -math.inf if fill == "-inf" else torch.finfo(torch.float32).min
    scores = torch.zeros(7, 3).masked_fill(~may_look, lowest)  # (T_txt, T_img)
    weights = scores.softmax(dim=-1)  # (T_txt, T_img)
    if fill == "blanked":
        weights = weights * may_look
    found = inside("read_masked", may_look.tolist(), values.tolist(), fill)
    nan = {"equal_nan": True, "atol": 1e-5, "rtol": 1e-6}
    for key, want in (("weights", weights), ("read", weights @ values)):
        got = torch.tensor([row[key] for row in found], dtype=torch.float32)
        torch.testing.assert_close(got, want, **nan)
    assert math.isnan(found[0]["read"]) == (fill == "-inf")


def test_labels_and_the_shift(inside):
    torch.manual_seed(0)
    for left in (True, False) * 20:
        input_ids = torch.randint(0, 5, (4, 12))  # (B, T_txt), 0 = <image>, 1 = the end
        n_pad, place = torch.randint(0, 12, (4, 1)), torch.arange(12)
        mask = place >= n_pad if left else place < 12 - n_pad  # (B, T_txt)
        want = make_labels(input_ids, 0, 1, mask)  # (B, T_txt)
        found = inside("make_labels", input_ids.tolist(), 0, 1, mask.int().tolist())
        assert found == want.tolist()
        answers = nn.functional.pad(want[:, 1:], (0, 1), value=IGNORE)  # (B, T_txt)
        assert inside("shifted", found) == answers.tolist()
    with pytest.raises(Exception, match="have one id"):
        inside("make_labels", [[1]], 3, 3)


ROWS = [
    {"prompt": "<image>", "writes": f"a lemon{EOC}<image>two owls{EOC}"},
    {"prompt": f"<image>a cow{EOC}<image>", "writes": f"a red apple on top{EOC}"},
]


def decoded(inside, rule, rows=ROWS):
    return inside.page.evaluate(
        "([rows, rule]) => liveFigures.inside.decode(rows, liveFigures.inside[rule])",
        [rows, rule],
    )


def test_a_count_per_row_is_that_of_the_whole_row(inside):
    found = decoded(inside, "count_per_row")
    where = torch.tensor([[w == IMAGE for w in row] for row in found["tokens"]])
    assert found["times"] == text_time(where).tolist()
    assert found["n_steps"] == 7 and found["n_prompt"] == 6


def test_the_forgetful_rule_is_openflamingos(inside):
    """Their own mixin, asked in each step what it tells its layers."""
    why = "needs open-flamingo: pip install --no-deps -r tests/requirements-parity.txt"
    theirs = pytest.importorskip("open_flamingo.src.flamingo_lm", reason=why)

    class Silent(nn.Module):
        def forward(self, **kwargs):
            """No language model is needed to see where `<image>` stood."""

    class Model(theirs.FlamingoLMMixin, Silent):
        pass

    model, layer = Model(), theirs.FlamingoLayer(nn.Identity(), nn.Identity())
    model.layers = nn.ModuleList([layer])
    model.set_decoder_layers_attr_name("layers")
    model.initialized_flamingo = model._use_cached_vision_x = True
    model.media_token_id = 1
    layer.condition_vis_x(torch.zeros(1))

    found = decoded(inside, "forgetful")
    ids = torch.tensor([[w == IMAGE for w in row] for row in found["tokens"]]).long()
    start = found["n_prompt"]
    times = []
    for piece in ids.split([start] + [1] * found["n_steps"], dim=1):
        model(piece, None)
        if layer.use_cached_media:
            now = layer.media_locations.count_nonzero(dim=1)[:, None]  # (B, 1)
        else:
            now = layer.media_locations.cumsum(dim=-1)  # (B, new)
        times.append(now)
    times = torch.cat(times, dim=1)  # (B, T_txt)
    assert found["times"] == times.tolist()
    assert times[0, -1] == 1 and times[1, -1] == 0  # one wrong picture, and none


SETTINGS = [
    {"B": B, "T_img": T_img, "T_txt": T_img * 32, "precision": precision, **flags}
    for B, T_img, precision in itertools.product((1, 48), (1, 9), budget.PRECISIONS)
    for flags in (
        {},
        {"with_muon": True, "gradient_checkpointing": True, "frozen_half": True},
    )
]


def test_the_budget_equals_pythons(inside):
    towers, models = inside.page.evaluate(
        """() => [liveFigures.inside.TOWERS, liveFigures.inside.MODELS]
        .map(Object.keys)"""
    )
    choices = list(itertools.product(towers, models, (1, 2, 4)))
    assert len(choices) == 48
    found = inside.page.evaluate(
        """([choices, settings]) => choices.map((choice) => {
        const my = liveFigures.inside, sizes = my.sizes_of(...choice);
        return [sizes, my.count_parameters(sizes), my.disk(sizes, {n_pictures: 3000}),
          my.disk(sizes, {n_pictures: 7, with_muon: true}),
          settings.map((s) => [my.memory_budget(sizes, s), my.arithmetic(sizes, s),
            my.kept_for_backward(sizes, s)])]; })""",
        [choices, SETTINGS],
    )
    assert found[choices.index(("ViT-L-14", "OPT-125m", 1))][0] == budget.PAPER
    for sizes, counts, disk, small_disk, rows in found:
        assert counts == budget.count_parameters(sizes)
        assert disk == budget.disk(sizes, 3000)
        assert small_disk == budget.disk(sizes, 7, with_muon=True)
        for settings, (memory, work, kept) in zip(SETTINGS, rows, strict=True):
            assert memory == budget.memory_budget(sizes, **settings)
            shape = {key: settings[key] for key in ("T_img", "T_txt")}
            assert work == pytest.approx(budget.arithmetic(sizes, **shape), rel=1e-12)
            shape |= {key: settings[key] for key in ("precision", "B")}
            assert kept == budget.kept_for_backward(sizes, **shape)


def test_the_largest_batch_equals_pythons(inside):
    gpus = inside.page.evaluate("liveFigures.inside.GPUS")
    assert gpus == budget.GPUS
    sizes = inside("sizes_of", "ViT-L-14", "OPT-1.3b", 2)
    fitted = set()
    for gpu, T_img in itertools.product(gpus.values(), (1, 9)):
        settings = {"T_img": T_img, "T_txt": 32 * T_img, "precision": "float32"}
        found = inside("largest_batch", gpu["memory"], 64, sizes, settings)
        fitted.add(found is not None)
        if found is None:
            with pytest.raises(ValueError, match="one sequence needs"):
                budget.largest_batch(gpu["memory"], sizes=sizes, **settings)
        else:
            want = budget.largest_batch(gpu["memory"], sizes=sizes, **settings)
            assert tuple(found) == want
    assert fitted == {True, False}


def test_the_towers_are_open_clips(inside):
    for name, sizes in inside.page.evaluate("liveFigures.inside.TOWERS").items():
        config = open_clip.get_model_config(name)
        vision = config["vision_cfg"]
        assert sizes["d"] == vision["width"] and sizes["layers"] == vision["layers"]
        assert sizes["patch"] == vision["patch_size"]
        assert sizes["out"] == config["embed_dim"]
        assert sizes["v"] == (vision["image_size"] // vision["patch_size"]) ** 2
        with torch.device("meta"):
            tower = VisionTransformer(
                image_size=vision["image_size"],
                patch_size=vision["patch_size"],
                width=vision["width"],
                layers=vision["layers"],
                heads=vision["width"] // vision.get("head_width", 64),
                mlp_ratio=4.0,
                output_dim=config["embed_dim"],
            )
        want = sum(p.numel() for p in tower.parameters())
        whole = inside("sizes_of", name, "OPT-125m")
        assert inside("count_parameters", whole)["vision encoder"] == want


def test_the_language_models_are_opts(inside):
    for name, sizes in inside.page.evaluate("liveFigures.inside.MODELS").items():
        config = OPTConfig(
            vocab_size=sizes["vocab"],
            hidden_size=sizes["d"],
            word_embed_proj_dim=sizes["d"],
            num_hidden_layers=sizes["layers"],
            ffn_dim=sizes["ffn"],
            num_attention_heads=sizes["heads"],
        )
        assert sizes["positions"] == config.max_position_embeddings + 2
        with torch.device("meta"):
            want = sum(p.numel() for p in OPTForCausalLM(config).parameters())
        counts = inside("count_parameters", inside("sizes_of", "ViT-L-14", name))
        assert counts["language model"] == want
        millions = float(name[4:-1]) * (1000 if name.endswith("b") else 1)
        assert want / 1e6 == pytest.approx(millions, rel=0.02)


# ------------------------------------------------------------------ clicks and keys


def table(page):
    return page.locator("tbody tr").evaluate_all(
        "rows => rows.map((row) => [...row.children].map((c) => c.innerText.trim()))"
    )


def said(page):
    return page.locator("[role=status]").inner_text()


def test_mask_by_click_and_key(opened):
    page = opened("mask")
    assert "✗" in said(page) and "nan" in said(page)
    page.fill("input[type=text]", "look <image>a kite<image>")
    assert table(page)[:4] == [
        ["</s>", "0", "✗ nan", "✗ nan", "✗ nan"],
        ["look", "0", "✗ nan", "✗ nan", "✗ nan"],
        ["<image>", "1", "✓ 1", "0", "10"],
        ["a", "1", "✓ 1", "0", "10"],
    ]
    page.get_by_label("all pictures so far").click()
    assert table(page)[-1] == ["<image>", "2", "✓ 0.50", "✓ 0.50", "15"]
    page.get_by_label("−∞").focus()
    page.keyboard.press("ArrowRight")
    assert table(page)[0] == ["</s>", "0", "✗ 0.50", "✗ 0.50", "✗ 15"]
    assert said(page).startswith("✗ </s>, look come before every picture")
    page.keyboard.press("ArrowRight")
    assert table(page)[1] == ["look", "0", "0", "0", "0"]
    assert said(page).startswith("✓") and "exactly 0" in said(page)
    assert "4 of 6 tokens look" in said(page)
    page.fill("input[type=text]", "no picture")
    assert "No <image>" in said(page) and table(page)[0] == ["</s>", "0", "0"]
    page.fill("input[type=text]", "<image>" * 9 + " word" * 40)
    assert len(table(page)) == 7 and "at most 6 pictures" in said(page)


def cards(page):
    """[[what stands in each card] of each row]."""
    return page.locator(".live-cards").evaluate_all(
        """rows => rows.map((row) => [...row.children].map((card) =>
        [...card.children].map((part) => part.textContent)))"""
    )


def test_labels_by_click_and_key(opened):
    page = opened("labels")
    assert cards(page)[1][:4] == [
        ["</s>", "−100", "–"],
        ["<image>", "−100", "→ a"],
        ["a", "a", "→ hot"],
        ["hot", "hot", "→ air"],
    ]
    page.locator(".live-cards button").nth(3).click()
    assert "Place 3 of row 0, <image>" in said(page) and said(page).endswith("4, a.")
    page.keyboard.press("ArrowLeft")
    assert said(page).endswith("the label of place 3 is −100, so nothing is asked.")
    page.keyboard.press("End")
    assert said(page).endswith("nothing follows, so nothing is asked.")
    page.get_by_label("left").click()
    assert cards(page)[1][:7] == [["<pad>", "−100", "–"]] * 6 + [["</s>", "−100", "–"]]
    page.get_by_label("the tokens themselves").click()
    text = page.locator(".live-wrong").inner_text()
    assert text.startswith("At 24 of 26 places") and "✗ 14 labels" in text
    page.get_by_label("make_labels").click()
    page.get_by_label("no shift").click()
    assert cards(page)[1][-1] == ["<end>", "<end>", "→ <end>"]
    assert "✗ Each token is marked against itself" in page.inner_text(".live-wrong")
    page.fill("textarea", "")
    assert cards(page) == [[["</s>", "−100", "–"]]]


def test_decoding_by_click_and_key(opened):
    page = opened("decoding")
    assert (
        "in one pass" in said(page)
        and page.get_by_role("button", name="Back").is_disabled()
    )
    page.get_by_role("button", name="Next").focus()
    for _ in range(4):
        page.keyboard.press("Enter")
    one, two = cards(page)
    assert one[-2:] == [["<end>", "1 ✓"], ["<image>", "2 ✓"]]
    assert two[-1] == ["above", "2 ✓"] and one[:4] == [["<pad>", ""]] * 4
    assert said(page).startswith("✓ Row 0 says <image>")
    page.get_by_label("the forgetful rule").click()
    one, two = cards(page)
    assert one[-1] == ["<image>", "1 ✗"] and two[-1] == ["above", "– ✗"]
    assert "row 0 takes picture 1 for picture 2; row 1 has lost its picture" in said(
        page
    )
    page.get_by_role("button", name="Next").focus()
    for _ in range(3):
        page.keyboard.press(" ")
    assert "it stays wrong" in said(page)
    assert page.evaluate("document.activeElement.textContent") == "Back"
    assert sum(card[1].endswith("✗") for row in cards(page) for card in row) == 8
    page.get_by_text("Start again").click()
    assert "in one pass" in said(page)
    page.get_by_text("Other rows").click()
    page.get_by_label("and what it writes").first.fill("a lemon")
    assert "Step 0 of 7" in page.inner_text(".live-figure")


def test_budget_by_click_and_key(opened):
    page = opened("budget")
    rows = dict((row[0], row[1]) for row in table(page))
    settings = {"B": 16, "precision": "float16"}
    for part, number in budget.memory_budget(**settings).items():
        assert rows[part] == f"{number / 1e9:.2f} GB"
    assert rows["gated blocks"] == "78.7 M"
    work, peak = budget.arithmetic(), budget.GPUS["T4"]["peak"]
    seconds = 3000 * work["encode a picture"] / peak
    assert rows["encode all pictures, once"] == f"> {seconds:.1f} s"
    assert said(page).startswith("✓ It fits")
    page.get_by_label("Batch").fill("1024")
    assert said(page).startswith("✗ It does not fit")
    best = budget.largest_batch(16e9, 1024, precision="float16")
    assert f"batches of {best[0]}, and {best[1]} of them" in said(page)
    page.get_by_label("GPU").select_option("A100")
    assert "memory of the A100" in dict((row[0], row[1]) for row in table(page))
    page.get_by_label("Batch").fill("16")
    page.get_by_label("CLIP").focus()
    page.keyboard.press("ArrowDown")
    assert "632" in dict((r[0], r[1]) for r in table(page))["vision encoder"]
    page.get_by_label("gradient checkpointing").focus()
    before = table(page)
    page.keyboard.press(" ")
    assert table(page) != before
    page.get_by_label("float32").click()
    assert "–" in [row[1] for row in table(page)][-1]


# -------------------------------------------------------------------- every figure


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_on_a_phone_nothing_sticks_out_and_all_can_be_read(opened, name, mode):
    page = opened(name, mode, width=390)
    page.evaluate(f"() => {{ {MOVES.get(name, '')} }}")
    assert page.locator(".live > img").is_hidden()
    assert page.evaluate(OVER) <= 0
    assert page.evaluate(CONTRAST) == []
    ground = page.evaluate(
        "getComputedStyle(document.querySelector('.live-figure')).backgroundColor"
    )
    dark = sum(map(int, re.findall(r"\d+", ground)[:3])) < 200
    assert dark == (mode == "dark")


@pytest.mark.parametrize("name", NAMES)
def test_every_control_is_reached_by_tab(opened, name):
    page = opened(name)
    controls = ".live-figure :is(button:enabled, input, select, textarea, summary)"
    wanted = page.locator(controls).evaluate_all(
        """all => new Set(all.filter((e) => e.tabIndex >= 0 && e.checkVisibility())
        .map((e) => e.name || e.id || e.textContent)).size"""
    )
    seen = set()
    for _ in range(wanted + 6):
        page.keyboard.press("Tab")
        one = page.evaluate(
            """() => { const e = document.activeElement;
            return e.matches('button, input, select, textarea, summary')
              && (e.name || e.id || e.textContent); }"""
        )
        seen |= {one} - {False}
    assert len(seen) == wanted > 2


def test_without_scripts_the_still_stays(browser, folder):
    page = browser.new_page(java_script_enabled=False)
    page.goto(small_page("mask", folder).as_uri())
    assert page.locator(".live > img").count() == 1
    assert page.locator(".live > img[hidden], .live-figure").count() == 0
    page.close()


def test_a_figure_that_fails_leaves_the_still(browser, folder):
    page, faults = watched(browser, small_page("later", folder).as_uri())
    page.evaluate(
        """liveFigures.register("later", (element) => {
        element.append("half"); throw new Error("no"); })"""
    )
    assert page.locator(".live-figure").count() == 0
    assert page.locator(".live > img[hidden]").count() == 0
    assert faults and all("no" in fault for fault in faults)
    page.close()


def test_a_figure_may_keep_the_still(browser, folder):
    page, faults = watched(browser, small_page("later", folder).as_uri())
    page.evaluate(
        'liveFigures.register("later", (e) => { e.append("a"); return false; })'
    )
    assert page.inner_text(".live-figure") == "a" and not faults
    assert page.locator(".live > img[hidden]").count() == 0
    page.close()


def test_nothing_moves_for_those_who_asked(opened):
    for wish, moves in (("reduce", False), ("no-preference", True)):
        page = opened("budget", reduced_motion=wish)
        found = page.evaluate(
            "getComputedStyle(document.querySelector('.live-bar')).transitionDuration"
        )
        assert (found != "0s") == moves


def test_on_paper_the_still_is_printed(opened):
    page = opened("mask")
    page.emulate_media(media="print")
    assert page.locator(".live-figure").is_hidden()
    style = "getComputedStyle(document.querySelector('.live > img')).display"
    assert page.evaluate(style) == "block"


def test_the_script_asks_for_nothing():
    assert not re.search(r"\bfetch\(|XMLHttpRequest|https?:", SCRIPT)
    assert not re.search(r"url\(|@import", (STATIC / "figures.css").read_text())


@pytest.mark.usefixtures("rendered")
@pytest.mark.parametrize("name", NAMES)
def test_in_the_rendered_book_the_figure_is_there(browser, name):
    (path,) = (HTML / "book").glob(f"{CHAPTERS[name]}_*.html")
    page, faults = watched(browser, path.as_uri(), width=390)
    assert page.locator(".live-figure:visible").count() == 1
    assert page.locator(".live > img").is_hidden()
    assert page.evaluate(OVER) <= 0 and not faults
    page.close()
