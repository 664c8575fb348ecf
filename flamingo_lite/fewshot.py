# Written by tools/book/sync.py from book/10_few_shot.ipynb.
# Edit the notebook, not this file.
"""Few-shot prompts: demonstrations with pictures, their controls, and scores.

An episode is one prompt: {"numbers": pictures of the demonstrations, then that of the
question; "texts": a text for each, the last one the right answer; "answer": that text}.
Pictures are numbers into a list of scenes, so that each is encoded once.
"""

__all__ = [
    "QUESTIONS",
    "group_scenes",
    "task_episode",
    "naming_episode",
    "to_learn",
    "spoil",
    "make_episodes",
    "answer",
    "in_words",
    "answer_in_words",
    "nearest",
    "caption_words",
    "cider_d",
]

import re
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial

import numpy as np
import torch

from flamingo_lite.generation import _copies, _later, caption, make_prompt
from flamingo_lite.tasks import KIND_OF, made_up, with_article

QUESTIONS = ("thing", "number", "kind")


def group_scenes(scenes):
    """Sort scenes by what they show and who drew it: {thing: {studio: [numbers]}}."""
    groups = {}
    for number, scene in enumerate(scenes):
        thing = scene["thing"] if "thing" in scene else scene["things"][0]
        studio = scene["studio"] if "studio" in scene else scene["studios"][0]
        groups.setdefault(thing, {}).setdefault(studio, []).append(number)
    return groups


def task_episode(rng, scenes, question, n_shots):
    """A prompt in which the demonstrations alone say what the question is.

    Args:
        rng: numpy Generator.
        scenes: from `make_counts`.
        question: one of QUESTIONS: the demonstrations give the thing, the number or
            the kind.
        n_shots: how many demonstrations.

    Returns:
        an episode; the answer is the last scene's "thing", "number" or "kind".

    Raises:
        ValueError: an unknown question, too few scenes, or they cannot answer it.
    """
    if question not in QUESTIONS:
        raise ValueError(f"no question {question!r}; there are {', '.join(QUESTIONS)}")
    if not 0 <= n_shots < len(scenes):
        raise ValueError(f"{n_shots} shots and a question, and {len(scenes)} scenes")
    if question not in scenes[0]:
        raise ValueError(f"these scenes have no {question!r}: draw them by make_counts")
    numbers = rng.choice(len(scenes), n_shots + 1, replace=False).tolist()
    texts = [scenes[number][question] for number in numbers]
    return {"numbers": numbers, "texts": texts, "answer": texts[-1]}


def _new_words(rng, things, known, taken):
    """{thing: a made-up word with its article}, none known and none taken."""
    words = {}
    for _ in range(100 * len(things)):
        name = made_up(rng)
        if name in known:  # one more, by a lot of its own: all other lots stay
            name = made_up(rng.spawn(1)[0])
        new = name not in known and name not in taken
        if new and with_article(name) not in words.values():
            words[things[len(words)]] = with_article(name)
        if len(words) == len(things):
            return words
    raise ValueError(
        f"{len(things)} made-up words wanted, and {len(words)} are found that are no "
        "known names: take fewer words, or fewer names into `known`"
    )


def naming_episode(rng, groups, n_ways, n_shots, query_studios=(), known=KIND_OF):
    """A prompt that names some things with made-up words, then shows one of them again.

    The picture of the question is by a studio that drew no demonstration.

    Args:
        rng: numpy Generator.
        groups: from `group_scenes`.
        n_ways: how many things.
        n_shots: demonstrations for each; they come in rounds, each in another order.
        query_studios: who may have drawn the picture of the question, and then draws
            no demonstration; empty, anyone.
        known: names that the model may have learned. No word is one of them, and none
            is the name of a thing in `groups`: "dog", too, can be made up.

    Returns:
        an episode, with "words", {thing: its made-up name}, and "thing", which the
        question shows.

    Raises:
        ValueError: too few things are drawn by the studios that are needed, numbers
            that cannot be, or too few words that are no known names.
        TypeError: `query_studios` or `known` is one string.
    """
    for name, given in (("studios", query_studios), ("things", known)):
        if isinstance(given, str):
            raise TypeError(f"want names of {name} in a list, so [{given!r}]")
    if n_ways < 1 or n_shots < 0:
        raise ValueError(f"{n_ways} things with {n_shots} shots each: no such prompt")
    apart, usable = set(query_studios), []
    for thing, studios in groups.items():
        others = set(studios) - apart
        if len(others) > 1 - bool(apart) and (not apart or apart & set(studios)):
            usable.append(thing)
    if len(usable) < n_ways:
        raise ValueError(f"{n_ways} things wanted, and {len(usable)} can be shown")
    things = rng.choice(usable, n_ways, replace=False).tolist()
    words = _new_words(rng, things, set(known), groups)
    final = things[int(rng.integers(n_ways))]
    last = str(rng.choice(sorted(apart & set(groups[final]) or groups[final])))
    shown = [thing for _ in range(n_shots) for thing in rng.permutation(things)]
    numbers = []
    for thing in shown:
        studio = rng.choice(sorted(set(groups[thing]) - apart - {last}))
        numbers.append(int(rng.choice(groups[thing][studio])))
    numbers.append(int(rng.choice(groups[final][last])))
    texts = [words[thing] for thing in [*shown, final]]
    about = {"words": words, "thing": final}
    return {"numbers": numbers, "texts": texts, "answer": texts[-1], **about}


def to_learn(episode):
    """The texts of an episode for training: what cannot be known yet is only given.

    A made-up word is given where it comes first, and so is the first demonstration of a
    task: no picture tells them.
    """
    seen, texts = set(), []
    for number, text in enumerate(episode["texts"]):
        new = text not in seen if "words" in episode else number == 0
        texts.append((text, "") if new else text)
        seen.add(text)
    return texts


def spoil(rng, episode, how, groups=None):
    """The same prompt with demonstrations that help less; the question stays.

    Args:
        rng: numpy Generator.
        episode: see above.
        how: "no pictures", each demonstration has the last picture of all, number -1,
            which should be a blank one; "wrong pictures", pictures of other things than
            the prompt names, taken from `groups` (in a task of numbers or kinds some
            may fit their texts); "shuffled texts", each text is
            replaced by another one of the prompt, everywhere by the same. If all its
            texts are one and the same, that changes nothing.

    Raises:
        ValueError: an unknown way, or too few other pictures in `groups`.
    """
    *shown, question = episode["numbers"]
    *texts, answer = episode["texts"]
    if how == "no pictures":
        shown = [-1] * len(shown)
    elif how == "wrong pictures":
        inside, groups = set(episode.get("words", episode["texts"])), groups or {}
        hands = [h for t in groups if t not in inside for h in groups[t].values()]
        outside = [n for hand in hands for n in hand if n not in episode["numbers"]]
        if len(outside) < len(shown):
            raise ValueError(f"want {len(shown)} other pictures, got {len(outside)}")
        shown = rng.choice(outside, len(shown), replace=False).tolist()
    elif how == "shuffled texts":
        kinds = list(dict.fromkeys(texts))
        after = dict(zip(kinds, kinds[1:] + kinds[:1], strict=True))
        texts = [after[text] for text in texts]
    else:
        raise ValueError(f"no way {how!r} to spoil a prompt")
    return {**episode, "numbers": [*shown, question], "texts": [*texts, answer]}


def make_episodes(
    scenes,
    n,
    seed,
    n_shots,
    n_ways=None,
    question=None,
    how=None,
    longest=None,
    **choice,
):
    """Some prompts of one sort, always the same for the same seed.

    Args:
        scenes: from `make_counts` for tasks; of single things for naming.
        n: how many.
        seed: an int.
        n_shots: demonstrations; for naming, of each thing.
        n_ways: new words in a prompt; None, prompts for a task.
        question: one of QUESTIONS, for a task.
        how: see `spoil`; None, demonstrations as they should be. The questions are
            the same for every `how`.
        longest: draw prompts of so many shots, and show the first `n_shots` of each:
            the same questions for every number of shots, after more or fewer
            demonstrations. None, draw them anew for each.
        **choice: for `naming_episode`.

    Raises:
        ValueError: `longest` is less than `n_shots`, or that below 0; and see
            `task_episode`, `naming_episode`, `spoil`.
    """
    drawn = n_shots if longest is None else longest
    if drawn < n_shots:
        raise ValueError(f"{n_shots} shots wanted, of prompts of {longest} at the most")
    if n_shots < 0:
        raise ValueError(f"{n_shots} shots: no such prompt")
    n_shown = n_shots * (n_ways or 1)
    rng, luck = np.random.default_rng((seed, 1)), np.random.default_rng((seed, 2))
    groups, episodes = group_scenes(scenes), []
    for _ in range(n):
        if n_ways is None:
            episode = task_episode(rng, scenes, question, drawn)
        else:
            episode = naming_episode(rng, groups, n_ways, drawn, **choice)
        for part in ("numbers", "texts"):
            *shown, last = episode[part]
            episode[part] = [*shown[:n_shown], last]
        episodes.append(spoil(luck, episode, how, groups) if how else episode)
    return episodes


def _picture_numbers(episodes, features):
    """The picture numbers of each episode, lists, once features have them all."""
    if isinstance(episodes, Mapping) or not len(episodes):
        raise ValueError("want a list of one or more episodes")
    if len(features.shape) != 4:
        raise ValueError(f"want (scenes, F, v, d_img), got {tuple(features.shape)}")
    numbers, n = [episode["numbers"] for episode in episodes], len(features)
    for i, row in enumerate(numbers):
        if len(row) != len(numbers[0]) or len(row) != len(episodes[i]["texts"]):
            n_texts, n_first = len(episodes[i]["texts"]), len(numbers[0])
            counts = f"{len(row)} pictures and {n_texts} texts"
            raise ValueError(f"episode {i} has {counts}, the first {n_first} pictures")
        if not all(-1 <= number < n for number in row):
            raise ValueError(f"episode {i} wants pictures {row}, and there are {n}")
    if {-1, n - 1} <= {number for row in numbers for number in row}:
        raise ValueError("picture -1 should be a blank one, put last, and is a scene")
    return [[number % n for number in row] for row in numbers]


def answer(model, tokenizer, features, episodes, batch_size=50, **kwargs):
    """What the model writes at the end of each episode: list of strings.

    Args:
        model, tokenizer: from `load_flamingo`.
        features: (scenes, F, v, d_img), see `encode_pictures`; for "no pictures" a
            blank picture's after those of the scenes. Or a `FeatureCache`, of which
            only the pictures of one batch are in memory.
        episodes: all with the same number of pictures.
        batch_size: prompts at a time.
        **kwargs: for `caption`. Where none of them, nor a `generation_config` among
            them, says how long an answer may be, it is cut after 8 tokens.

    Raises:
        ValueError: no episodes, or features that are not those of their scenes; and
            see `caption`.
    """
    numbers = _picture_numbers(episodes, features)
    prompts = [make_prompt(e["texts"][:-1]) for e in episodes]
    settings = {"batch_size": batch_size, **kwargs}
    config = kwargs.get("generation_config")
    limits = ("max_new_tokens", "max_length")
    if not any(kwargs.get(n) or getattr(config, n, None) for n in limits):
        settings["max_new_tokens"] = 8
    may_follow, said = kwargs.get("prefix_allowed_tokens_fn"), []
    for first in range(0, len(episodes), batch_size):
        if may_follow is not None:  # it counts the rows of all batches
            before = first * _copies(model, kwargs)
            settings["prefix_allowed_tokens_fn"] = partial(_later, may_follow, before)
        rows = numbers[first : first + batch_size]  # (B, T_img)
        pictures = features[sum(rows, [])].unflatten(0, (len(rows), -1))
        own = prompts[first : first + batch_size]
        said += caption(model, None, tokenizer, pictures, own, **settings)
    return said


def in_words(episode, scenes):
    """A naming prompt for a language model alone: names stand for the pictures.

    Args:
        episode: of `naming_episode`.
        scenes: those that the episode numbers.

    Returns:
        'lemon: this is a dax. fox: this is a wug. lemon: this is', ready to go on.

    Raises:
        ValueError: a picture that is none of the scenes, such as a blank one.
    """
    numbers = episode["numbers"]
    if not all(0 <= number < len(scenes) for number in numbers):
        raise ValueError(f"pictures {numbers} of {len(scenes)}: one has no name")
    shown = [scenes[number] for number in numbers]
    names = [s["thing"] if "thing" in s else s["things"][0] for s in shown]
    turns = zip(names, episode["texts"][:-1], strict=False)
    told = "".join(f"{name}: this is {text}. " for name, text in turns)
    return f"{told}{names[-1]}: this is"


@torch.no_grad()
def answer_in_words(lm, tokenizer, episodes, scenes, batch_size=50):
    """What a language model alone writes at the end of the same prompts in words.

    Args:
        lm: a language model from transformers, with `tokenizer`.
        episodes: of `naming_episode`.
        scenes: those that the episodes number.
        batch_size: prompts at a time.

    Returns:
        list of strings, what it writes up to a full stop.

    Raises:
        ValueError: see `in_words`; or no list of episodes.
    """
    if isinstance(episodes, Mapping):
        raise ValueError("want a list of episodes, and not one of them")
    prompts, found = [in_words(episode, scenes) for episode in episodes], []
    device = getattr(lm, "device", "cpu")
    for start in range(0, len(prompts), batch_size):
        some = prompts[start : start + batch_size]
        batch = tokenizer(some, padding=True, padding_side="left", return_tensors="pt")
        inputs = {name: ids.to(device) for name, ids in _inputs(batch).items()}
        ids = lm.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = ids[:, batch.input_ids.shape[1] :]  # (some, new)
        found += tokenizer.batch_decode(new, skip_special_tokens=True)
    return [text.split(".")[0].strip() for text in found]


def _inputs(batch):
    """What a decoder takes of a tokenizer's output."""
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def nearest(queries, support, k):
    """Which demonstrations to show: RICES (Yang et al. 2021, arXiv 2109.05014).

    Args:
        queries, support: (queries, d) and (support, d) embeddings of pictures.
        k: how many for each query.

    Returns:
        (queries, k) numbers into `support`, on the CPU, the most similar one last.

    Raises:
        ValueError: fewer than k in `support`, or a number that is not finite.
    """
    if not 0 <= k <= len(support):
        raise ValueError(f"{k} wanted of {len(support)} to choose from")
    if not (queries.isfinite().all() and support.isfinite().all()):
        raise ValueError("an embedding has a number that is not finite")
    queries, support = (
        torch.nn.functional.normalize(x.to(queries.device).float(), dim=-1)
        for x in (queries, support)
    )
    return (queries @ support.transpose(0, 1)).topk(k, dim=1).indices.flip(1).cpu()


_QUOTES = str.maketrans("’‘“”", "''\"\"")
_MARKS = r"""[.?!'"`()\[\]{}…–—-]"""
_ENDINGS = r"'(?:s|m|d|re|ve|ll)\b"


def caption_words(text):
    """The words of a caption as the usual evaluation counts them: list of strings.

    Small letters and no punctuation; "dog's" and "isn't" are two words each. So does
    the PTB tokenizer of COCO's evaluation (`pycocoevalcap`), for plain captions. It
    differs in the rest: it keeps the dot of an abbreviation ("Mr."), leaves brackets as
    words ("-lrb-") and several marks together as one ("!!!"), and cuts "gonna", "$5".
    """
    text = text.lower().translate(_QUOTES)
    text = re.sub(r"[,;:](?!\d)|(?<!\d)[,;:]", " ", text)  # 1,000 and 10:30 stay
    text = re.sub(rf"(?<!\w)(?:(?!{_ENDINGS}){_MARKS})+|{_MARKS}+(?!\w)", " ", text)
    text = re.sub(r"\bcannot\b", "can not", text)
    return re.sub(rf"(?<=\w)(n't\b|{_ENDINGS})", r" \1", text).split()


def _ngrams(words, n):
    """How often each run of n words occurs in a list of words: Counter."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _check_captions(captions, references):
    """Both as lists; an error that names the first picture with something else."""
    for name, given in (("captions", captions), ("references", references)):
        if isinstance(given, (str, Mapping)):
            raise TypeError(f"{name} must be a list, one entry for each picture")
    captions = list(captions)
    references = [x if isinstance(x, str) else list(x) for x in references]
    if not captions or len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions, references of {len(references)}")
    for i, (written, own) in enumerate(zip(captions, references, strict=True)):
        if not isinstance(written, str):
            raise TypeError(f"picture {i}: want its caption, a string, got {written!r}")
        if isinstance(own, str):
            raise TypeError(f"picture {i}: want a list of references, so [{own!r}]")
        if not own or not all(isinstance(text, str) for text in own):
            raise TypeError(f"picture {i}: want one or more references, got {own!r}")
    return captions, references


def cider_d(captions, references, sigma=6.0, normalise=True):
    """CIDEr-D, how well captions agree with references (Vedantam et al. 2015).

    Runs of one to four words are weighted by how rare they are among all references;
    a caption that repeats itself or has another length than the reference loses.

    Args:
        captions: a string for each picture.
        references: a list of strings for each picture.
        sigma: how much a difference in length is forgiven.
        normalise: count words as `caption_words` does; False, as they stand between
            blanks, for texts that a tokenizer has cut already.

    Returns:
        (pictures,) scores from 0 to 10; their mean is the usual number.

    Raises:
        TypeError, ValueError: other things than strings, or other numbers of them.

    Warns where all scores are 0 whatever the captions say: one picture alone, or the
    same references for all, in which nothing is rare.
    """
    captions, references = _check_captions(captions, references)
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    cut = caption_words if normalise else str.split
    captions = [cut(text) for text in captions]
    references = [[cut(text) for text in own] for own in references]
    total, log_n, nothing_rare = np.zeros(len(captions)), np.log(len(references)), True
    for n in range(1, 5):
        truths = [[_ngrams(words, n) for words in own] for own in references]
        seen_in = Counter(gram for t in truths for gram in set().union(*t))
        nothing_rare &= all(count == len(references) for count in seen_in.values())

        def weigh(counts, seen_in=seen_in):
            rare = {g: log_n - np.log(max(1, seen_in[g])) for g in counts}
            return {g: counts[g] * rare[g] for g in counts}

        for i, (words, own) in enumerate(zip(captions, truths, strict=True)):
            mine, scores = weigh(_ngrams(words, n)), []
            for true, reference in zip(map(weigh, own), references[i], strict=True):
                common = sum(min(mine.get(g, 0), w) * w for g, w in true.items())
                norms = [np.sqrt(sum(w * w for w in x.values())) for x in (mine, true)]
                longer = _ngrams(words, 2).total() - _ngrams(reference, 2).total()
                scale = norms[0] * norms[1] or 1.0
                scores.append(common / scale * np.exp(-(longer**2) / (2 * sigma**2)))
            total[i] += np.mean(scores)
    if nothing_rare:
        why = "no words are rarer than others in these references: all scores are 0"
        warnings.warn(f"{why}. Score many pictures in one call.", stacklevel=2)
    return total * 10 / 4
