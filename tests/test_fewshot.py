"""Few-shot prompts and their controls, against slow loops; scores, against others'."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import D_IMG, V, opt_config, save_language_model
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from flamingo_lite import (
    NUMBERS,
    QUESTIONS,
    answer,
    answer_in_words,
    caption,
    cider_d,
    group_scenes,
    make_episodes,
    make_prompt,
    naming_episode,
    nearest,
    spoil,
    task_episode,
    to_learn,
)

quick = settings(deadline=None, derandomize=True, max_examples=60)
WAYS = ("no pictures", "wrong pictures", "shuffled texts")
THINGS = ("lemon", "owl", "bus", "key", "tent", "dog", "fox", "rose")
KIND = {"lemon": "food", "owl": "animal", "bus": "vehicle", "dog": "animal"}
KIND |= {"fox": "animal", "rose": "plant"}
STUDIOS = ("noto", "fluent", "twemoji")
seeds = st.integers(0, 2**32)


def singles(n_each=2, things=THINGS, studios=STUDIOS):
    """Scenes of single things without pictures, in no order."""
    scenes = [
        {"things": [thing], "studios": [studio], "text": f"a {thing}"}
        for thing in things
        for studio in studios
        for _ in range(n_each)
    ]
    return [scenes[i] for i in np.random.default_rng(0).permutation(len(scenes))]


def counts(n=60):
    """Scenes of one to four of a thing without pictures."""
    rng, scenes = np.random.default_rng(1), []
    for _ in range(n):
        thing, studio = str(rng.choice(THINGS)), str(rng.choice(STUDIOS))
        about = {"thing": thing, "kind": KIND.get(thing, "thing"), "studio": studio}
        scenes.append({**about, "number": str(rng.choice(NUMBERS))})
    return scenes


SINGLES, COUNTS = singles(), counts()
GROUPS = group_scenes(SINGLES)


def thing_in(number, scenes=SINGLES):
    scene = scenes[number]
    return scene.get("thing") or scene["things"][0]


def studio_of(number, scenes=SINGLES):
    scene = scenes[number]
    return scene.get("studio") or scene["studios"][0]


# --------------------------------------------------------------------------- episodes


@pytest.mark.parametrize("scenes", [SINGLES, COUNTS], ids=["singles", "counts"])
def test_group_scenes(scenes):
    """Every scene is in one place, and that is the right one."""
    groups, found = group_scenes(scenes), []
    for thing, studios in groups.items():
        for studio, numbers in studios.items():
            for number in numbers:
                assert thing_in(number, scenes) == thing
                assert studio_of(number, scenes) == studio
            found += numbers
    assert sorted(found) == list(range(len(scenes)))


def test_group_scenes_goes_by_the_first_of_two_things():
    pair = {"things": ["owl", "bus"], "studios": ["noto", "fluent"]}
    assert group_scenes([pair]) == {"owl": {"noto": [0]}}


@given(seeds, st.sampled_from(QUESTIONS), st.integers(0, 8))
@quick
def test_a_task_episode_says_what_its_pictures_show(seed, question, n_shots):
    episode = task_episode(np.random.default_rng(seed), COUNTS, question, n_shots)
    numbers = episode["numbers"]
    assert len(numbers) == len(set(numbers)) == n_shots + 1
    assert episode["texts"] == [COUNTS[number][question] for number in numbers]
    assert episode["answer"] == COUNTS[numbers[-1]][question]
    assert all(type(number) is int for number in numbers)


def test_a_task_episode_that_cannot_be():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no question 'colour'; there are thing, num"):
        task_episode(rng, COUNTS, "colour", 2)
    with pytest.raises(ValueError, match="4 shots and a question, and 4 scenes"):
        task_episode(rng, COUNTS[:4], "thing", 4)
    assert len(task_episode(rng, COUNTS[:5], "thing", 4)["numbers"]) == 5


@st.composite
def shelves(draw):
    """Scenes of a few things, each by some of four studios, and who may be asked."""
    scenes, studios = [], ["a", "b", "c", "d"]
    for thing in THINGS[: draw(st.integers(1, 7))]:
        for studio in draw(st.lists(st.sampled_from(studios), unique=True)):
            scene = {"things": [thing], "studios": [studio]}
            scenes += [scene] * draw(st.integers(1, 3))
    query_studios = draw(st.lists(st.sampled_from([*studios, "e"]), max_size=2))
    return draw(st.permutations(scenes)), tuple(query_studios)


def can_be_shown(scenes, query_studios):
    """Things with a picture to ask about, and one by another hand to show before."""
    things = set()
    for asked in scenes:
        for shown in scenes:
            by, other = asked["studios"][0], shown["studios"][0]
            if asked["things"] == shown["things"] and by != other:
                if not query_studios or (
                    by in query_studios and other not in query_studios
                ):
                    things.add(asked["things"][0])
    return things


@given(seeds, shelves(), st.integers(1, 5), st.integers(1, 3))
@settings(deadline=None, derandomize=True, max_examples=300)
def test_a_naming_episode(seed, shelf, n_ways, n_shots):
    """All that it promises, or an error when too few things can be shown."""
    scenes, query_studios = shelf
    usable = can_be_shown(scenes, query_studios)
    rng, groups = np.random.default_rng(seed), group_scenes(scenes)
    if len(usable) < n_ways:
        message = f"{n_ways} things wanted, and {len(usable)} can be shown"
        with pytest.raises(ValueError, match=message):
            naming_episode(rng, groups, n_ways, n_shots, query_studios)
        return
    episode = naming_episode(rng, groups, n_ways, n_shots, query_studios)
    words, numbers, texts = episode["words"], episode["numbers"], episode["texts"]
    things = [thing_in(number, scenes) for number in numbers]
    assert len(words) == len(set(words.values())) == n_ways
    assert set(words) == set(things[:-1]) <= usable
    assert texts == [words[thing] for thing in things]
    assert episode["thing"] == things[-1] and episode["answer"] == texts[-1]
    assert set(Counter(texts[:-1]).values()) == {n_shots}
    for i in range(n_shots):  # in rounds
        assert set(texts[i * n_ways : (i + 1) * n_ways]) == set(words.values())
    studios = [studio_of(number, scenes) for number in numbers]
    assert studios[-1] not in studios[:-1]
    if query_studios:
        assert studios[-1] in query_studios
        assert not set(query_studios) & set(studios[:-1])


def test_naming_episodes_differ():
    """Every thing, word and studio is asked for, and each round has its own order."""
    rng = np.random.default_rng(0)
    episodes = [naming_episode(rng, GROUPS, 4, 2) for _ in range(200)]
    assert {episode["thing"] for episode in episodes} == set(THINGS)
    asked = [list(e["words"]).index(e["thing"]) for e in episodes]
    assert min(Counter(asked).values()) > 25 and len(set(asked)) == 4
    places = [e["texts"][:4].index(e["answer"]) for e in episodes]
    assert min(Counter(places).values()) > 25 and len(set(places)) == 4
    assert {studio_of(e["numbers"][-1]) for e in episodes} == set(STUDIOS)
    assert sum(e["texts"][:4] != e["texts"][4:8] for e in episodes) > 150
    assert len({word for e in episodes for word in e["words"].values()}) > 400
    numbers = Counter(number for e in episodes for number in e["numbers"])
    assert set(numbers) == set(range(len(SINGLES)))


def test_no_made_up_word_is_the_name_of_a_thing():
    """A consonant, a vowel and a consonant are "dog" and "pig" too."""
    named = ("dog", "pig", "bus", "gem", "rose", "fire", "tiger", "tulip", "lemon")
    groups = group_scenes(singles(1, named, STUDIOS[:2]))
    rng, clashes = np.random.default_rng(0), []
    for _ in range(1000):
        words = naming_episode(rng, groups, 5, 1)["words"].values()
        clashes += [word for word in words if word.removeprefix("a ") in named]
    assert not clashes


# ----------------------------------------------------------------------------- to learn


@given(seeds, st.integers(1, 5), st.integers(1, 3))
@quick
def test_a_new_word_is_only_given_where_it_comes_first(seed, n_ways, n_shots):
    episode = naming_episode(np.random.default_rng(seed), GROUPS, n_ways, n_shots)
    before = copy.deepcopy(episode)
    texts = to_learn(episode)
    assert episode == before
    for i, (text, told) in enumerate(zip(episode["texts"], texts, strict=True)):
        assert told == (text if text in episode["texts"][:i] else (text, ""))
    assert sum(isinstance(text, tuple) for text in texts) == n_ways
    assert texts[-1] == episode["answer"]  # the question is learned from


@given(seeds, st.sampled_from(QUESTIONS), st.integers(0, 6))
@quick
def test_of_a_task_only_the_first_text_is_given(seed, question, n_shots):
    episode = task_episode(np.random.default_rng(seed), COUNTS, question, n_shots)
    first, *others = episode["texts"]
    assert to_learn(episode) == [(first, ""), *others]


# ----------------------------------------------------------------------------- controls


def of(episode):
    """The scenes that a prompt is about, and their groups."""
    return (SINGLES, GROUPS) if "words" in episode else (COUNTS, group_scenes(COUNTS))


@st.composite
def naming_episodes(draw):
    rng, n_shots = np.random.default_rng(draw(seeds)), draw(st.integers(1, 3))
    return naming_episode(rng, GROUPS, draw(st.integers(1, 5)), n_shots)


@st.composite
def task_episodes(draw):
    rng, n_shots = np.random.default_rng(draw(seeds)), draw(st.integers(1, 6))
    return task_episode(rng, COUNTS, draw(st.sampled_from(QUESTIONS)), n_shots)


episodes = naming_episodes() | task_episodes()


@given(seeds, episodes, st.sampled_from(WAYS))
@quick
def test_what_is_asked_stays(seed, episode, how):
    before = copy.deepcopy(episode)
    spoilt = spoil(np.random.default_rng(seed), episode, how, of(episode)[1])
    assert episode == before, "the prompt itself was changed"
    assert spoilt.keys() == episode.keys()
    for part in ("answer", "words", "thing"):
        assert spoilt.get(part) == episode.get(part)
    for part in ("numbers", "texts"):
        assert len(spoilt[part]) == len(episode[part])
        assert spoilt[part][-1] == episode[part][-1]
    stays = "numbers" if how == "shuffled texts" else "texts"
    assert spoilt[stays] == episode[stays]


@given(seeds, episodes)
@quick
def test_no_pictures(seed, episode):
    spoilt = spoil(np.random.default_rng(seed), episode, "no pictures")
    assert set(spoilt["numbers"][:-1]) == {-1}


def check_wrong_pictures(seed, episode, named):
    """They show none of the named things, and none is in the prompt already."""
    scenes, groups = of(episode)
    spoilt = spoil(np.random.default_rng(seed), episode, "wrong pictures", groups)
    wrong = spoilt["numbers"][:-1]
    assert not {thing_in(number, scenes) for number in wrong} & named
    assert not set(wrong) & set(episode["numbers"])
    assert len(set(wrong)) == len(wrong)


@given(seeds, naming_episodes())
@quick
def test_wrong_pictures_show_none_of_the_things_with_new_names(seed, episode):
    check_wrong_pictures(seed, episode, set(episode["words"]))


@given(seeds, task_episodes())
@quick
def test_wrong_pictures_of_a_task_show_none_of_the_named_things(seed, episode):
    """Nor is the picture that is asked about among them."""
    check_wrong_pictures(seed, episode, set(episode["texts"]))


@pytest.mark.parametrize("others", [None, {}, {"fox": {"noto": [7]}}])
def test_too_few_other_pictures_say_how_many(others):
    episode = {"numbers": [0, 1, 2], "texts": ["a dax", "a wug", "a dax"]}
    episode |= {"words": {"lemon": "a dax", "tent": "a wug"}, "answer": "a dax"}
    with pytest.raises(ValueError, match="2 other pictures, got [01]"):
        spoil(np.random.default_rng(0), episode, "wrong pictures", others)


def test_wrong_pictures_are_any_others():
    rng = np.random.default_rng(0)
    episode = naming_episode(rng, GROUPS, 2, 1)
    shown = Counter()
    for _ in range(300):
        shown.update(spoil(rng, episode, "wrong pictures", GROUPS)["numbers"][:-1])
    others = [n for n in range(len(SINGLES)) if thing_in(n) not in episode["words"]]
    assert set(shown) == set(others) and min(shown.values()) > 3


@given(seeds, episodes)
@quick
def test_shuffled_texts_leave_no_text_in_its_place(seed, episode):
    """Each is another one of the prompt, everywhere the same."""
    texts = episode["texts"][:-1]
    assume(len(set(texts)) > 1)
    spoilt = spoil(np.random.default_rng(seed), episode, "shuffled texts")
    pairs = set(zip(texts, spoilt["texts"][:-1], strict=True))
    assert all(old != new for old, new in pairs)
    assert len(pairs) == len(set(texts))
    assert {new for _, new in pairs} == set(texts)


def test_an_unknown_way_is_refused():
    episode = naming_episode(np.random.default_rng(0), GROUPS, 2, 1)
    with pytest.raises(ValueError, match="no way 'no words' to spoil"):
        spoil(np.random.default_rng(0), episode, "no words", GROUPS)


SORTS = [
    {"n_ways": 3, "n_shots": 2},
    {"n_ways": 2, "n_shots": 1, "query_studios": ("twemoji",)},
    *({"question": question, "n_shots": 5} for question in QUESTIONS),
]


@pytest.mark.parametrize("sort", SORTS, ids=lambda sort: " ".join(map(str, sort)))
def test_every_control_has_the_same_questions(sort):
    """And the same demonstrations, but for what is spoilt."""
    scenes = SINGLES if "n_ways" in sort else COUNTS
    right = make_episodes(scenes, 20, 4, **sort)
    assert len(right) == 20
    assert right == make_episodes(scenes, 20, 4, **sort)
    assert right[:7] == make_episodes(scenes, 7, 4, **sort)
    assert right != make_episodes(scenes, 20, 5, **sort)
    for how in WAYS:
        spoilt = make_episodes(scenes, 20, 4, how=how, **sort)
        assert spoilt == make_episodes(scenes, 20, 4, how=how, **sort)
        for one, other in zip(right, spoilt, strict=True):
            assert one["numbers"][-1] == other["numbers"][-1]
            assert one["answer"] == other["answer"] == other["texts"][-1]
            assert one.get("words") == other.get("words")
            stays = "numbers" if how == "shuffled texts" else "texts"
            assert one[stays] == other[stays]
            assert one != other or len(set(one["texts"][:-1])) == 1


@pytest.mark.parametrize("sort", SORTS, ids=lambda sort: " ".join(map(str, sort)))
def test_fewer_shots_ask_the_same(sort):
    """Of prompts of `longest` shots, the first ones; the controls too."""
    sort = {key: value for key, value in sort.items() if key != "n_shots"}
    n_ways, scenes = sort.get("n_ways", 1), SINGLES if "n_ways" in sort else COUNTS
    full = make_episodes(scenes, 20, 4, 3, **sort)
    assert full == make_episodes(scenes, 20, 4, 3, longest=3, **sort)
    assert full != make_episodes(scenes, 20, 4, 3, longest=4, **sort)
    for n_shots in (0, 1, 2):
        cut = make_episodes(scenes, 20, 4, n_shots, longest=3, **sort)
        n = n_shots * n_ways
        for one, other in zip(cut, full, strict=True):
            for part in ("numbers", "texts"):
                assert one[part] == other[part][:n] + other[part][-1:]
            assert one["answer"] == other["answer"]
            assert one.get("words") == other.get("words")
        for how in WAYS:
            spoilt = make_episodes(scenes, 20, 4, n_shots, how=how, longest=3, **sort)
            for one, other in zip(cut, spoilt, strict=True):
                assert len(other["numbers"]) == len(other["texts"]) == n + 1
                assert other["numbers"][-1] == one["numbers"][-1]
                assert other["answer"] == one["answer"] == other["texts"][-1]
                assert set(other["texts"][:-1]) == set(one["texts"][:-1])


def test_more_shots_than_the_longest():
    with pytest.raises(ValueError, match="3 shots wanted, of prompts of 2 at the most"):
        make_episodes(SINGLES, 5, 0, 3, n_ways=2, longest=2)


def test_no_demonstrations():
    for sort in ({"n_ways": 2}, {"question": "kind"}):
        scenes = SINGLES if "n_ways" in sort else COUNTS
        for how in (None, *WAYS):
            episodes = make_episodes(scenes, 5, 0, 0, how=how, **sort)
            assert len(episodes) == 5
            for episode in episodes:
                assert episode["texts"] == [episode["answer"]]
                assert len(episode["numbers"]) == 1


# ------------------------------------------------------------------------------ answers


def test_answer_is_one_caption_after_another(small):
    """Prompts of unequal length in batches; the blank picture is the last of all."""
    model, _, tokenizer = small
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(len(SINGLES) + 1, 1, V, D_IMG, generator=generator).half()
    for how in (None, "no pictures"):
        episodes = make_episodes(SINGLES, 5, 0, 2, n_ways=2, how=how)
        found = answer(model, tokenizer, features, episodes, batch_size=2)
        for episode, text in zip(episodes, found, strict=True):
            *shown, asked = episode["numbers"]
            some = [features[-1] if n == -1 else features[n] for n in [*shown, asked]]
            prompt = "".join(
                f"<image>{text}<|endofchunk|>" for text in episode["texts"][:-1]
            )
            assert make_prompt(episode["texts"][:-1]) == f"{prompt}<image>"
            pictures, room = torch.stack(some)[None], {"max_new_tokens": 8}
            alone = caption(
                model, None, tokenizer, pictures, f"{prompt}<image>", **room
            )
            assert [text] == alone
        assert len(set(found)) > 1, "the pictures do nothing"


def test_answer_passes_on_how_to_write(small):
    model, _, tokenizer = small
    features = torch.randn(len(SINGLES), 1, V, D_IMG)
    episodes = make_episodes(SINGLES, 3, 0, 1, n_ways=2)
    long = answer(model, tokenizer, features, episodes)
    short = answer(model, tokenizer, features, episodes, max_new_tokens=1)
    assert [a.startswith(b) for a, b in zip(long, short, strict=True)] == [True] * 3
    assert long != short


def lengths_of(small, texts):
    return [len(small[2](text, add_special_tokens=False).input_ids) for text in texts]


def test_an_answer_is_as_long_as_it_is_asked_for(small):
    """8 tokens by default; a configuration that said more was not heard."""
    model, _, tokenizer = small
    features = torch.randn(len(SINGLES), 1, V, D_IMG)
    ask = (model, tokenizer, features, make_episodes(SINGLES, 3, 0, 1, n_ways=2))
    endless = {"eos_token_id": None}
    short, long = answer(*ask, **endless), answer(*ask, **endless, max_new_tokens=12)
    assert max(lengths_of(small, short)) < min(lengths_of(small, long))
    asked = GenerationConfig(max_new_tokens=12)
    assert answer(*ask, **endless, generation_config=asked) == long
    asked = GenerationConfig(do_sample=False)
    assert answer(*ask, **endless, generation_config=asked) == short
    one = (*ask[:3], ask[3][:1])
    n_prompt = len(tokenizer(make_prompt(ask[3][0]["texts"][:-1])).input_ids)
    assert answer(*one, **endless, max_length=n_prompt + 12) == long[:1]
    stop = {"stop_strings": [long[0][4:8]], "max_new_tokens": 12}
    assert len(answer(*one, **endless, **stop)[0]) < len(long[0])


def test_several_answers_to_each_episode(small):
    """Who may follow is asked by the number of the answer, through all batches."""
    model, _, tokenizer = small
    features, rows = torch.randn(len(SINGLES), 1, V, D_IMG), []
    ask = (model, tokenizer, features, make_episodes(SINGLES, 5, 0, 1, n_ways=2))
    options = {"num_return_sequences": 2, "do_sample": True, "max_new_tokens": 1}
    note = {"prefix_allowed_tokens_fn": lambda row, _: rows.append(row) or [5]}
    assert len(answer(*ask, batch_size=2, **options, **note)) == 10
    assert set(rows) == set(range(10))


class OnDisk:
    """Acts as a `FeatureCache`: pictures come as they are asked for by a list."""

    def __init__(self, features):
        self.features, self.shape, self.most = features, features.shape, 0

    def __len__(self):
        return len(self.features)

    def __getitem__(self, numbers):
        assert isinstance(numbers, list) and min(numbers) >= 0
        self.most = max(self.most, len(numbers))
        return self.features[numbers]


def test_answer_brings_one_batch_of_pictures_into_memory(small):
    model, _, tokenizer = small
    features = OnDisk(torch.randn(len(SINGLES) + 1, 1, V, D_IMG))
    episodes = make_episodes(SINGLES, 7, 0, 1, n_ways=2, how="no pictures")
    found = answer(model, tokenizer, features, episodes, batch_size=3)
    assert features.most == 3 * len(episodes[0]["numbers"])
    assert found == answer(model, tokenizer, features.features, episodes)
    rows = []
    may_follow = {"prefix_allowed_tokens_fn": lambda row, _: rows.append(row) or [5]}
    answer(model, tokenizer, features, episodes, batch_size=3, **may_follow)
    assert set(rows) == set(range(7)), "of the batch, and not of the episodes"


class Parrot:
    """A language model that answers every prompt with the same ids."""

    def __init__(self, ids):
        self.ids, self.prompts, self.masks = ids, [], []

    def generate(self, input_ids, attention_mask, max_new_tokens, **kwargs):
        assert kwargs == {"do_sample": False} and len(self.ids) <= max_new_tokens
        self.prompts += input_ids.tolist()
        self.masks += attention_mask.tolist()
        new = torch.tensor([self.ids] * len(input_ids))
        return torch.cat((input_ids, new), dim=1)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A small random OPT and its tokenizer."""
    folder = tmp_path_factory.mktemp("lm") / "opt"
    path = save_language_model(folder, opt_config(max_position_embeddings=200))
    lm = AutoModelForCausalLM.from_pretrained(path).eval()
    return lm, AutoTokenizer.from_pretrained(path)


def told(episode):
    """A prompt in words."""
    names = [thing_in(number) for number in episode["numbers"]]
    lines = [
        f"{name}: this is {text}."
        for name, text in zip(names[:-1], episode["texts"][:-1], strict=True)
    ]
    return " ".join([*lines, f"{names[-1]}: this is"])


def test_answer_in_words_tells_the_prompt(language_model):
    """Names for pictures, padded on the left; what follows the answer is cut off."""
    _, tokenizer = language_model
    episodes = make_episodes(SINGLES, 5, 0, 1, n_ways=3)
    ids = tokenizer(" a dax. lemon", add_special_tokens=False).input_ids[:8]
    parrot = Parrot(ids)
    found = answer_in_words(parrot, tokenizer, episodes, SINGLES, batch_size=2)
    assert found == ["a dax"] * 5
    for episode, row, mask in zip(episodes, parrot.prompts, parrot.masks, strict=True):
        assert mask == sorted(mask), "not padded on the left"
        real = [token for token, is_real in zip(row, mask, strict=True) if is_real]
        assert tokenizer.decode(real) == tokenizer.bos_token + told(episode)


@torch.no_grad()
def write_slowly(lm, tokenizer, prompt):
    """Greedy, without a cache, one row; the text up to a full stop or the end."""
    ids, new = tokenizer(prompt, return_tensors="pt").input_ids, []
    while len(new) < 8 and tokenizer.eos_token_id not in new:
        so_far = torch.cat((ids, torch.tensor([new], dtype=ids.dtype)), dim=1)
        new.append(int(lm(so_far).logits[0, -1].argmax()))
    return tokenizer.decode(new, skip_special_tokens=True).split(".")[0].strip()


def test_answer_in_words_is_what_the_model_would_write(language_model):
    """Each prompt alone, in batches of any size, also when some rows end earlier."""
    lm, tokenizer = language_model
    episodes = make_episodes(SINGLES, 6, 0, 2, n_ways=2)
    wanted = [write_slowly(lm, tokenizer, told(episode)) for episode in episodes]
    assert len(set(wanted)) > 1
    for batch_size in (1, 4):
        found = answer_in_words(lm, tokenizer, episodes, SINGLES, batch_size)
        assert found == wanted


def test_a_model_that_ends_its_answer_by_itself(language_model):
    """No special token is part of an answer, nor does it depend on its batch."""
    _, tokenizer = language_model
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = tokenizer(" a dax", add_special_tokens=False).input_ids
    parrot = Parrot([*ids, end, pad, pad][:8])
    episodes = make_episodes(SINGLES, 3, 0, 1, n_ways=2)
    assert answer_in_words(parrot, tokenizer, episodes, SINGLES) == ["a dax"] * 3


# ---------------------------------------------------------------------------- retrieval


@given(seeds, st.integers(1, 4), st.integers(1, 7), st.integers(1, 7))
@quick
def test_nearest_is_a_slow_loop(seed, n_queries, n_support, k):
    """By the angle alone, the most similar one last."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n_queries, 5, generator=generator)
    support = torch.randn(n_support, 5, generator=generator)
    k = min(k, n_support)
    found = nearest(queries, support, k)
    assert found.shape == (n_queries, k) and found.dtype == torch.int64
    for query, row in zip(queries.numpy(), found.tolist(), strict=True):
        angles = []
        for i, other in enumerate(support.numpy()):
            cosine = query @ other / np.linalg.norm(query) / np.linalg.norm(other)
            angles.append((cosine, i))
        assert row == [i for _, i in sorted(angles)[-k:]]
    stretch = torch.rand(n_support, 1, generator=generator) + 0.1
    assert torch.equal(nearest(3 * queries, support * stretch, k), found)


def test_nearest_takes_halves_and_finds_itself():
    support = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).half()
    assert nearest(support, support, 3)[:, -1].tolist() == list(range(6))


# ------------------------------------------------------------------------------ CIDEr-D


def their_cider(captions, references):
    """The scores of pycocoevalcap, and their mean."""
    why = "pip install --no-deps -r tests/requirements-parity.txt"
    theirs = pytest.importorskip("pycocoevalcap.cider.cider", reason=why)
    truths = dict(enumerate(references))
    guesses = {i: [text] for i, text in enumerate(captions)}
    mean, scores = theirs.Cider().compute_score(truths, guesses)
    return scores, mean


def check_cider(captions, references):
    """Of words as they stand; and by default too, of texts in small letters."""
    scores, mean = their_cider(captions, references)
    texts = [*captions, *(text for own in references for text in own)]
    plain = all(text == text.lower() for text in texts)
    for normalise in (False, True) if plain else (False,):
        found = cider_d(captions, references, normalise=normalise)
        assert found.shape == (len(captions),)
        np.testing.assert_allclose(found, scores, rtol=0, atol=1e-12)
        assert found.mean() == pytest.approx(mean, abs=1e-12)


words = st.sampled_from(["a", "lemon", "owl", "bus", "above", "the", "of", "left"])
lines = st.lists(words, max_size=9).map(" ".join)


@pytest.mark.filterwarnings("ignore:no words are rarer")
@given(st.lists(st.tuples(lines, st.lists(lines, min_size=1, max_size=4)), min_size=1))
@quick
def test_cider_is_theirs_on_random_captions(pictures):
    captions, references = zip(*pictures, strict=True)
    assume(any(map(any, references)))  # or theirs raises an error
    check_cider(list(captions), list(references))


EDGES = {
    "identical": (["a fox above a bus", "a fox"], [["a fox above a bus"], ["a fox"]]),
    "empty captions": (["", "a fox"], [["a lemon"], ["a fox"]]),
    "an empty reference": (["a lemon", "a fox"], [["", "a lemon"], ["a fox"]]),
    "nothing in common": (["one two", "three"], [["a lemon"], ["a fox"]]),
    "repeated words": (["fox fox fox fox", "a a a fox"], [["a fox"], ["a fox fox"]]),
    "one picture": (["a lemon above a tent"], [["a lemon above a tent"]]),
    "one picture, several references": (["a fox"], [["a fox", "a red fox", "fox"]]),
    "the same reference twice": (["a fox", "a bus"], [["a fox"] * 2, ["a bus", "bus"]]),
    "one word": (["fox", "bus"], [["fox"], ["fox bus"]]),
    "much longer": (["a fox " * 20, "a bus"], [["a fox"], ["a bus"]]),
    "much shorter": (["fox", "a bus"], [["a fox " * 20], ["a bus"]]),
    "blanks": (["  a   fox\n", "a\tbus"], [["a fox"], [" a bus "]]),
    "capitals are other words": (["A Fox", "a bus"], [["a fox"], ["a bus"]]),
    "in every reference": (["a fox", "a bus"], [["a fox a bus"], ["a fox a bus"]]),
}


@pytest.mark.filterwarnings("ignore:no words are rarer")
@pytest.mark.parametrize("what", EDGES)
def test_cider_is_theirs_at_the_edges(what):
    check_cider(*EDGES[what])


def test_cider_of_all_and_of_nothing_right():
    """Ten for four words or more that are right, none for no word in common."""
    references = [["a lemon above that tent"], ["one fox left of it"], ["what a bus"]]
    scores = cider_d([own for (own,) in references], references)
    np.testing.assert_allclose(scores, [10, 10, 7.5])
    assert cider_d(["x", "", "above"], references).tolist() == [0, 0, 0]
    with pytest.warns(UserWarning, match="no words are rarer"):
        assert cider_d(["a fox", ""], [[""], [""]]).tolist() == [0, 0]
    with pytest.raises(ValueError, match="1 captions, references of 3"):
        cider_d(["a bus"], references)
