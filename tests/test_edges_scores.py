"""Scores, few-shot prompts, labels and maps at their edges: what is refused and why."""

import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import D_IMG, ROOT, V
from PIL import Image

from flamingo_lite import (
    answer,
    answer_in_words,
    caption_words,
    cider_d,
    fewshot,
    group_scenes,
    make_episodes,
    make_labels,
    make_scenes,
    naming_episode,
    nearest,
    occlusion,
    score_captions,
    show_maps,
    task_episode,
)

REFERENCES = [["an iguana"], ["a fox"], ["a lemon above a tent"], ["a red bus"]]
CAPTIONS = ["an iguana", "a dog", "a lemon above a key", "a bus"]


# ------------------------------------------------------------------------------ CIDEr-D


def test_a_string_is_no_list_of_references():
    """It was taken for a list of letters, and scored 0.01."""
    with pytest.raises(TypeError, match=r"picture 0: .*\['an iguana'\]"):
        cider_d(CAPTIONS, [own for (own,) in REFERENCES])
    with pytest.raises(TypeError, match="picture 2: want a list of references"):
        cider_d(CAPTIONS, [*REFERENCES[:2], "a lemon", ["a bus"]])
    for bad in ("an iguana", {0: "an iguana"}):
        with pytest.raises(TypeError, match="captions must be a list"):
            cider_d(bad, REFERENCES)
        with pytest.raises(TypeError, match="references must be a list"):
            cider_d(CAPTIONS, bad)


@pytest.mark.parametrize("own", [[], [None], [["a fox"]], [3]])
def test_references_that_are_none(own):
    """No reference at all gave nan."""
    with pytest.raises(TypeError, match="picture 1: want one or more references"):
        cider_d(["a cow", "a fox"], [["a cow"], own])


@pytest.mark.parametrize("bad", [None, ["a fox"], 3])
def test_a_caption_that_is_no_string(bad):
    with pytest.raises(TypeError, match="picture 1: want its caption"):
        cider_d(["a cow", bad], [["a cow"], ["a fox"]])


def test_numbers_that_do_not_fit():
    with pytest.raises(ValueError, match="3 captions, references of 4"):
        cider_d(CAPTIONS[:3], REFERENCES)
    with pytest.raises(ValueError, match="0 captions"):
        cider_d([], [])
    for sigma in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="sigma must be positive"):
            cider_d(CAPTIONS, REFERENCES, sigma=sigma)


def test_tuples_and_generators_are_lists_too():
    wanted = cider_d(CAPTIONS, REFERENCES)
    assert (cider_d(tuple(CAPTIONS), map(tuple, REFERENCES)) == wanted).all()
    assert (
        cider_d(np.array(CAPTIONS), (iter(own) for own in REFERENCES)) == wanted
    ).all()


def test_capitals_and_marks_do_not_count():
    """Unless one asks for it: then "An iguana." has no word of the reference."""
    written = ["An iguana.", "A dog!", "“A lemon above a key”", "(A bus)"]
    wanted = cider_d(CAPTIONS, REFERENCES)
    assert wanted[0] > 4.9
    np.testing.assert_array_equal(cider_d(written, REFERENCES), wanted)
    in_capitals = [[own.upper() + "."] for (own,) in REFERENCES]
    np.testing.assert_array_equal(cider_d(CAPTIONS, in_capitals), wanted)
    as_they_stand = cider_d(written, REFERENCES, normalise=False)
    assert as_they_stand[0] == 0
    np.testing.assert_array_equal(
        cider_d(CAPTIONS, REFERENCES, normalise=False), wanted
    )


def test_one_picture_alone_warns():
    """And several with the same references; a second picture makes it a score."""
    with pytest.warns(UserWarning, match="all scores are 0"):
        assert cider_d(["a fox"], [["a fox"]]).tolist() == [0]
    with pytest.warns(UserWarning, match="Score many pictures in one call"):
        assert cider_d(["a fox", "a cow"], [["a fox"]] * 2).tolist() == [0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cider_d(["a fox", "a cow"], [["a fox"], ["a cow"]]).max() > 0


WORDS = {
    "An iguana.": "an iguana",
    "A dog's bowl, a cat's tail & the dogs' beds": "a dog 's bowl a cat 's tail & the "
    "dogs beds",
    "Don't touch! It isn't 3.5 m; it's 1,000 km - at 10:30.": "do n't touch it is n't "
    "3.5 m it 's 1,000 km at 10:30",
    "a man --- no, two men -- on a \"big\" 'old' bus...": "a man no two men on a big "
    "old bus",
    "She said “hello” and ‘bye’ – really — yes…": "she said hello and bye really yes",
    "a black-and-white T-shirt, an e-mail": "a black-and-white t-shirt an e-mail",
    "I'm sure we're there; they'll say he'd won't": "i 'm sure we 're there they 'll "
    "say he 'd wo n't",
    "it’s a dog’s, dog,cat": "it 's a dog 's dog cat",
    " two   blanks\tand tab\n": "two blanks and tab",
    "cannot": "can not",
    "1. a café": "1 a café",
    "": "",
    "...": "",
}


@pytest.mark.parametrize("text", WORDS)
def test_words_of_a_caption(text):
    words = caption_words(text)
    assert words == WORDS[text].split()
    assert caption_words(" ".join(words)) == words, "cut twice is not cut once"


MARKS = "''|'|``|`|-LRB-|-RRB-|-LCB-|-RCB-|.|?|!|,|:|-|--|...|;".split("|")


def test_words_are_those_of_the_usual_tokenizer(tmp_path):
    """Stanford's, as pycocoevalcap calls it, where there are it and Java."""
    why = "needs pycocoevalcap: pip install --no-deps -r tests/requirements-parity.txt"
    theirs = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason=why)
    if shutil.which("java") is None:
        pytest.skip("no Java on the PATH: words are not compared with Stanford's")
    jar = Path(theirs.__file__).with_name(theirs.STANFORD_CORENLP_3_4_1_JAR)
    rng, texts = random.Random(0), [text for text in WORDS if text.strip(". \t\n")]
    said = ["a", "dog's", "isn't", "red", "two-tone", "bus,", "The", "girls'", "3.5"]
    said += ["it's", "-", "by", "I'm", "A", "cup;", "left:", '"big"', "1,000"]
    texts += [
        " ".join(rng.choices(said, k=8)) + " dog" + rng.choice(".!?")
        for _ in range(200)
    ]
    texts = [" ".join(text.split()) for text in texts]
    (tmp_path / "in.txt").write_text("\n".join(texts) + "\n")
    done = subprocess.run(
        ["java", "-cp", jar, "edu.stanford.nlp.process.PTBTokenizer"]
        + ["-preserveLines", "-lowerCase", "-encoding", "utf-8", tmp_path / "in.txt"],
        capture_output=True,
        check=True,
    )
    lines = done.stdout.decode().splitlines()
    for text, line in zip(texts, lines, strict=True):
        assert caption_words(text) == [w for w in line.split() if w not in MARKS], text


# ------------------------------------------------------------------ things in captions


@pytest.mark.parametrize(
    "text, known, share",
    [
        ("an umbrella above a fox", (), 1.0),
        ("a beach umbrella above a fox", ("beach umbrella",), 0.5),
        ("a beach umbrella above an umbrella", ("beach umbrella",), 0.5),
        ("an umbrella above a fox-hound", (), 0.5),
        ("a fox, an umbrella.", (), 1.0),
        ("a foxglove", ("a (very) odd name",), 0.0),
    ],
)
def test_whole_names_count_the_longest_first(text, known, share):
    """An umbrella was seen in each beach umbrella."""
    scene = {"text": "an umbrella above a fox", "things": ["umbrella", "fox"]}
    other = [{"text": "x", "things": [name]} for name in known]
    nothing = [""] * len(other)
    assert score_captions([text], [scene], known)["things"] == [share]
    assert score_captions([text, *nothing], [scene, *other])["things"][0] == share


# ----------------------------------------------------------------------------- episodes


THINGS = ("lemon", "owl", "bus", "key")
SCENES = [
    {"things": [thing], "studios": [studio], "text": f"a {thing}"}
    for thing in THINGS
    for studio in ("noto", "fluent", "twemoji")
]


def test_a_studio_is_no_list_of_studios():
    """Its letters were taken for studios: "0 things can be shown"."""
    rng, groups = np.random.default_rng(0), group_scenes(SCENES)
    with pytest.raises(TypeError, match=r"so \['twemoji'\]"):
        naming_episode(rng, groups, 2, 1, "twemoji")
    assert naming_episode(rng, groups, 2, 1, ["twemoji"])["answer"]


@pytest.mark.parametrize("known", [None, ["wug", "dax"]])
def test_no_made_up_word_is_known(monkeypatch, known):
    """Once 1 prompt in 150 of five words called a thing "a dog"."""
    groups, words = group_scenes(SCENES), []
    choice = {} if known is None else {"known": known}
    lots = iter(["dog", "wug", "tulip", "dax", "lemon", "fep", "kib"] * 50)
    monkeypatch.setattr(fewshot, "made_up", lambda rng: next(lots))
    for _ in range(20):
        episode = naming_episode(np.random.default_rng(0), groups, 2, 1, **choice)
        words += episode["words"].values()
    refused = {"a lemon"} | ({"a dog", "a tulip"} if known is None else set())
    refused |= {f"a {name}" for name in known or ()}
    allowed = {"a dog", "a wug", "a tulip", "a dax", "a fep", "a kib"} - refused
    assert set(words) <= allowed and len(set(words)) > 1


def test_words_that_all_are_known(monkeypatch):
    """It looked for one that is not for ever."""
    groups = group_scenes(SCENES)
    monkeypatch.setattr(fewshot, "made_up", lambda rng: "dog")
    with pytest.raises(ValueError, match="2 made-up words wanted, and 0 are found"):
        naming_episode(np.random.default_rng(0), groups, 2, 1)
    with pytest.raises(ValueError, match="2 made-up words wanted, and 1 are found"):
        make_episodes(SCENES, 1, 0, 1, n_ways=2, known=[])
    with pytest.raises(TypeError, match=r"so \['dog'\]"):
        naming_episode(np.random.default_rng(0), groups, 2, 1, known="dog")


def test_a_known_word_moves_no_other_lot():
    """Pictures, order and all other words of prompts stay, whatever is known."""
    asked = {"n_ways": 3, "longest": 2}
    plain = make_episodes(SCENES, 40, 0, 2, known=(), **asked)
    word = plain[7]["texts"][0]
    other = make_episodes(SCENES, 40, 0, 2, known=[word.split()[1]], **asked)
    changed = [i for i in range(40) if plain[i] != other[i]]
    assert 7 in changed and all(word in plain[i]["texts"] for i in changed)
    assert [e["numbers"] for e in other] == [e["numbers"] for e in plain]
    assert not any(word in e["texts"] for e in other)


def test_numbers_of_shots_that_cannot_be():
    rng, groups = np.random.default_rng(0), group_scenes(SCENES)
    for n_ways, n_shots in ((0, 1), (2, -1)):
        with pytest.raises(ValueError, match="no such prompt"):
            naming_episode(rng, groups, n_ways, n_shots)
    with pytest.raises(ValueError, match="-1 shots"):
        make_episodes(SCENES, 3, 0, -1, n_ways=2, longest=2)
    counts = [{"thing": "lemon", "number": "two", "kind": "food", "studio": "noto"}] * 3
    for n_shots in (3, -1):
        with pytest.raises(ValueError, match=f"{n_shots} shots .* 3 scenes"):
            task_episode(rng, counts, "number", n_shots)
    with pytest.raises(ValueError, match="no 'number': draw them by make_counts"):
        task_episode(rng, SCENES, "number", 1)


def test_answer_refuses_numbers_that_do_not_fit(small):
    model, _, tokenizer = small
    features = torch.randn(len(SCENES) + 1, 1, V, D_IMG)
    episodes = make_episodes(SCENES, 2, 0, 1, n_ways=2)
    assert len(answer(model, tokenizer, features, episodes)) == 2
    longer = make_episodes(SCENES, 1, 0, 2, n_ways=2)
    other = {**episodes[1], "numbers": episodes[1]["numbers"][1:]}
    far = {**episodes[0], "numbers": [0, 1, 99]}
    for bad, why in (
        (episodes[0], "want a list of one or more episodes"),
        ([], "want a list of one or more episodes"),
        (episodes + longer, "episode 2 has 5 pictures .* the first 3"),
        ([episodes[0], other], "episode 1 has 2 pictures and 3 texts"),
        ([far], "episode 0 wants pictures .* there are 13"),
        ([{**far, "numbers": [0, 1, -2]}], "episode 0 wants pictures"),
    ):
        with pytest.raises(ValueError, match=why):
            answer(model, tokenizer, features, bad)
    with pytest.raises(ValueError, match=r"want \(scenes, F, v, d_img\)"):
        answer(model, tokenizer, features[:, 0], episodes)


def test_a_scene_is_no_blank_picture(small):
    """Number -1 is the last one: an error where that is a scene that is asked about."""
    model, _, tokenizer = small
    features = torch.randn(len(SCENES), 1, V, D_IMG)
    last = {"numbers": [-1, len(SCENES) - 1], "texts": ["a dax", "a wug"]}
    with pytest.raises(ValueError, match="picture -1 should be a blank one"):
        answer(model, tokenizer, features, [last])


def test_a_blank_picture_has_no_name():
    """It was called by the name of the last scene."""
    episodes = make_episodes(SCENES, 2, 0, 1, n_ways=2, how="no pictures")
    with pytest.raises(ValueError, match="one has no name"):
        answer_in_words(None, None, episodes, SCENES)
    with pytest.raises(ValueError, match="one has no name"):
        far = {"numbers": [0, len(SCENES)], "texts": ["a dax", "a dax"]}
        answer_in_words(None, None, [far], SCENES)
    with pytest.raises(ValueError, match="want a list of episodes"):
        answer_in_words(None, None, episodes[0], SCENES)


def test_nearest_of_too_few_or_of_nan():
    """nan came out as the most similar of all."""
    support = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="4 wanted of 3"):
        nearest(support, support, 4)
    spoilt = support.clone()
    spoilt[1, 2] = float("nan")
    for pair in ((support, spoilt), (spoilt, support)):
        with pytest.raises(ValueError, match="not finite"):
            nearest(*pair, 1)


# --------------------------------------------------------------- labels, maps, pictures


def test_a_mask_of_another_shape():
    """(T_txt,) was spread over all rows."""
    ids = torch.tensor([[0, 7, 1], [0, 8, 1]])
    for mask in (torch.ones(3), torch.ones(1, 3), torch.ones(3, 2)):
        with pytest.raises(ValueError, match="want one shape"):
            make_labels(ids, 0, 1, mask)


def test_everything_is_imported_without_matplotlib():
    """Only who draws needs it."""
    code = (
        "import sys\nfor name in ('matplotlib', 'matplotlib.pyplot'):\n"
        "    sys.modules[name] = None\n"
        "from flamingo_lite import *\n"
        "print(attention_maps.__name__, show_maps.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.split() == ["attention_maps", "show_maps"], done.stderr


def test_maps_that_are_not_square():
    square, wide = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 32))
    with pytest.raises(ValueError, match="64 x 32: cut out the square"):
        show_maps(wide, ["a"], torch.ones(1, 16))
    for titles, maps in ((["a"], torch.ones(1, 15)), (["a", "b"], torch.ones(1, 16))):
        with pytest.raises(ValueError, match="no squares"):
            show_maps(square, titles, maps)


def covered_by(small, picture, cells=4):
    """The pictures that the image processor is handed."""
    model, image_processor, tokenizer = small
    seen = []

    def noting(one):
        seen.append(one)
        return image_processor(one)

    costs = occlusion(model, noting, tokenizer, picture, "a lemon", 2, cells)
    assert costs.shape == (cells, cells) and costs.isfinite().all()
    return seen


@pytest.mark.parametrize("size", [(64, 64), (40, 90), (90, 40), (50, 51)])
def test_every_part_of_a_picture_is_covered_once(small, size):
    """Of a high picture only a part of its height was; of 51 pixels not the last."""
    noise = np.random.default_rng(0).integers(1, 256, (size[1], size[0], 3), np.uint8)
    noise[0, 0] = 0  # the corner, which no other pixel is like
    whole, *parts = covered_by(small, Image.fromarray(noise))
    assert len(parts) == 16
    changed = [np.any(np.asarray(part) != noise, axis=-1) for part in parts]
    times = np.sum(changed, axis=0)
    times[0, 0] += 1  # it is covered by its own colour
    assert (times == 1).all()


def test_a_transparent_picture_is_covered_on_white(small):
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    for one in covered_by(small, picture):
        assert one.mode == "RGB" and one.getextrema() == ((255, 255),) * 3


def test_occlusion_of_a_token_that_is_not_there(small):
    model, image_processor, tokenizer = small
    picture = Image.new("RGB", (64, 64))
    for place in (0, -1, 50):
        with pytest.raises(ValueError, match=f"token {place} of "):
            occlusion(model, image_processor, tokenizer, picture, "a lemon", place)
    with pytest.raises(ValueError, match="99 x 99 parts"):
        occlusion(model, image_processor, tokenizer, picture, "a lemon", 2, 99)


def test_the_cover_exchanges_one_thing_and_leaves_the_rest(monkeypatch):
    """Its lower row is a picture of its own, the same but for the last thing."""
    monkeypatch.syspath_prepend(ROOT)
    from flamingo_lite import is_held_out, load_captions, load_sprites
    from tools.book import make_cover

    rows = [row for row in load_captions(ROOT / "data" / "emoji") if row["named"]]
    rows = [row for row in rows if row["trained"]]
    sprites, names = load_sprites(rows), {row["thing"]: row["text"] for row in rows}
    rng = np.random.default_rng(0)
    for number, scene in enumerate(make_scenes(rows, 4, 5, pairs=1.0, held_out=True)):
        other = make_cover.exchanged(rng, scene, sprites)
        assert other["things"][0] == scene["things"][0]
        assert other["things"][1] not in scene["things"]
        assert is_held_out(*other["things"]) and other["studios"] == scene["studios"]
        one, two = (
            np.asarray(make_cover.drawn(s, sprites, names, number)["picture"])
            for s in (scene, other)
        )
        half = np.s_[:32] if scene["relation"] == "above" else np.s_[:, :32]
        assert np.array_equal(one[half], two[half]) and not np.array_equal(one, two)
