#!/usr/bin/env python3
"""Scenes as tensors: every drawing in one atlas, whole batches composed at once.

`draw_scene` of chapter 7 puts one drawing after another on a canvas with Pillow: easy
to read, and on one core. Here a batch is composed on the device that trains; each
drawing is laid on its canvas by an affine map. All chance is drawn on the CPU, from a
seed, so a batch is the same on every device.

    python tools/weights/atlas.py --out sheet.png
        sixty scenes, to look at
    python tools/weights/atlas.py --time --json data/atlas_pace.json
        scenes and steps a second, beside Pillow's

Shapes: an atlas is (drawings, 4, 64, 64) bytes, RGBA; a scene has two layers or more;
pictures are (B, 3, 64, 64) in 0 … 1.
"""

import argparse
import json
import sys
import time
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import nn

from flamingo_lite.data import RELATIONS, SIZE, draw_scene
from tools import ROOT

DATA = ROOT / "data"
UNSEEN = ("twemoji", "openmoji")  # and clip art by the artists kept for testing
SORTS = {"emoji": 0.3, "copies": 0.2, "silhouette": 0.2, "clip art": 0.3}
SMALL = 40  # pixels: a drawing shown smaller is taken from the half-size atlas
# How coarsely JPEG keeps each frequency of an 8 x 8 block: of brightness and of colour
# (ITU T.81, tables K.1 and K.2).
BRIGHTNESS = """
16 11 10 16 24 40 51 61  12 12 14 19 26 58 60 55  14 13 16 24 40 57 69 56
14 17 22 29 51 87 80 62  18 22 37 56 68 109 103 77  24 35 55 64 81 104 113 92
49 64 78 87 103 121 120 101  72 92 95 98 112 100 103 99"""
COLOUR = (
    """
17 18 24 47 99 99 99 99  18 21 26 66 99 99 99 99  24 26 56 99 99 99 99 99
47 66 99 99 99 99 99 99"""
    + " 99" * 32
)


def read_rows(*folders):
    """Rows of caption folders, with "path" and "sort", an entry of SORTS."""
    rows = []
    for folder in folders:
        for line in (folder / "metadata.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.append({"sort": "emoji", **row, "path": folder / row["file_name"]})
    return rows


def outlined(drawing, width=5):
    """The same drawing as flat colours inside black lines, or as lines alone."""
    alpha = drawing.getchannel("A")
    solid = alpha.point(lambda value: 255 * (value > 100))
    rim = ImageChops.subtract(solid.filter(ImageFilter.MaxFilter(width)), solid)
    colours = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing)
    grey = ImageOps.autocontrast(
        colours.convert("L").filter(ImageFilter.MedianFilter(3))
    )
    edges = ImageChops.subtract(
        grey.filter(ImageFilter.MaxFilter(3)), grey.filter(ImageFilter.MinFilter(3))
    ).point(lambda value: 255 * (value > 60))
    ink = ImageChops.lighter(rim, edges)
    flat = ImageOps.posterize(colours.convert("RGB"), 2).convert("RGBA")
    flat.putalpha(solid)
    white = Image.new("RGBA", drawing.size, "white")
    white.putalpha(solid)
    black = Image.new("RGBA", drawing.size, "black")
    return Image.composite(black, flat, ink), Image.composite(black, white, ink)


class Atlas:
    """All drawings as tensors, and which are to be had of each thing.

    Args:
        rows: with "path", "thing" and "sort".
        device: where the drawings lie and the scenes are composed.
        copies: add to each coloured drawing its two `outlined` copies.

    Attributes:
        pixels: (drawings, 4, 64, 64) uint8. A drawing in one ink has its paper in RGB:
            0 where the ink is, 255 where the paper shows.
        inked: (drawings,) bool: is it drawn in one ink, whose colour is free?
        hands: for each drawing whose it is.
        of: {thing: {sort: [numbers of drawings]}}.
    """

    def __init__(self, rows, device="cpu", copies=True):
        pixels, inked, self.of, self.hands = [], [], {}, []

        def add(row, sort, drawing, one_ink):
            numbers = self.of.setdefault(row["thing"], {}).setdefault(sort, [])
            numbers.append(len(pixels))
            pixels.append(np.asarray(drawing).transpose(2, 0, 1))
            inked.append(one_ink)
            self.hands.append(row["studio"])

        for row in rows:
            with Image.open(row["path"]) as picture:
                drawing = picture.convert("RGBA")
            one_ink = row["sort"] == "silhouette"
            add(row, row["sort"], drawing, one_ink)
            if copies and not one_ink:
                width = 3 if zlib.crc32(row["file_name"].encode()) % 2 else 5
                flat, lines = outlined(drawing, width)
                add(row, "copies", flat, False)
                add(row, "copies", lines, True)
        self.pixels = torch.from_numpy(np.stack(pixels)).to(device)
        self.inked = torch.tensor(inked, device=device)
        whole = premultiply(self.pixels)
        half = nn.functional.avg_pool2d(whole, 2)
        self.half = (half * 255).round().byte()  # (drawings, 4, 32, 32), premultiplied
        self.device = device

    def pick(self, rng, thing):
        """The number of a drawing of the thing: first its sort by lot, then which."""
        sorts = self.of[thing]
        weight = np.array([SORTS[sort] for sort in sorts])
        sort = list(sorts)[rng.choice(len(sorts), p=weight / weight.sum())]
        return sorts[sort][rng.integers(len(sorts[sort]))]


def premultiply(pixels):
    """RGBA bytes as floats in 0 … 1, colours times alpha: (…, 4, H, W)."""
    shares = pixels.float() / 255
    shares[..., :3, :, :] *= shares[..., 3:, :, :]
    return shares


def plain_numbers(rng, n, relation=None, background=None):
    """The numbers that `draw_scene` draws from `rng`, as a plan for one scene."""
    if background is None:
        background = tuple(int(c) for c in rng.integers(200, 256, 3))
    sizes, places, mirrored = [0, 0], [(0, 0), (0, 0)], [False, False]
    for i in range(n):
        if relation is None:
            sizes[i] = int(rng.integers(36, 61))
            places[i] = tuple(int(c) for c in rng.integers(0, SIZE - sizes[i] + 1, 2))
        else:
            sizes[i] = int(rng.integers(25, 32))
            along = int(rng.integers(0, SIZE // 2 - sizes[i] + 1)) + i * SIZE // 2
            across = int(rng.integers(0, SIZE - sizes[i] + 1))
            places[i] = (across, along) if relation == "above" else (along, across)
        mirrored[i] = rng.random() < 0.5
    ground = torch.tensor([background]) / 255  # (1, 3)
    return {
        "size": torch.tensor([sizes]).float(),  # (1, 2)
        "place": torch.tensor([places]).float(),  # (1, 2, 2), left and top
        "mirror": torch.tensor([mirrored]),
        "ground": torch.stack([ground, ground], dim=1),  # (1, 2, 3)
    }


def free_numbers(generator, relations, ground_share=(0.3, 0.4, 0.3)):
    """A plan for a batch in which everything that may differ does, drawn at random.

    Args:
        generator: a CPU torch.Generator.
        relations: for each scene None, or one of RELATIONS.
        ground_share: of white, pale and free grounds.

    Returns:
        dict of CPU tensors, the first axis B; what `compose` and `weather` read.
    """
    B = len(relations)

    def uniform(low, high, *shape):
        return torch.rand(B, *shape, generator=generator) * (high - low) + low

    def some(share, *shape):
        return torch.rand(B, *shape, generator=generator) < share

    pair = torch.tensor([relation is not None for relation in relations])  # (B,)
    above = torch.tensor([relation == "above" for relation in relations])  # (B,)
    size = torch.where(pair[:, None], uniform(22, 32, 2), uniform(30, SIZE, 2))
    room = torch.where(pair[:, None], SIZE / 2, SIZE) - size  # (B, 2)
    along = uniform(0, 1, 2) * room.clamp(min=0)
    along[:, 1] += pair * SIZE / 2
    across = uniform(0, 1, 2) * (SIZE - size)
    swap = above[:, None]
    left, top = torch.where(swap, across, along), torch.where(swap, along, across)

    kind = uniform(0, 1)  # (B,)
    pale = uniform(0.75, 1, 2, 3)
    ground = torch.where((kind < ground_share[0])[:, None, None], 1.0, pale)
    free = (kind >= ground_share[0] + ground_share[1])[:, None, None]
    ground = torch.where(free, uniform(0, 1, 2, 3), ground)  # (B, 2, 3)
    level = ~some(0.3)[:, None]  # most grounds are of one colour
    ground[:, 1] = torch.where(level, ground[:, 0], ground[:, 1])

    # An ink that can be told from its ground: dark on light, or light on dark.
    light = ground.mean(dim=(1, 2)) > 0.5  # (B,)
    shade = uniform(0, 1, 2, 3) * uniform(0, 0.45, 1, 1)  # (B, 2, 3)
    shade = torch.where(some(0.5, 1, 1), shade * 0.1, shade)  # often near black
    ink = torch.where(light[:, None, None], shade, 1 - shade)
    paper = torch.where(some(0.5, 2)[..., None], ground[:, :1], 1 - shade * 0.3)
    paper = torch.where(light[:, None, None], paper, 0.2 * (1 - ink))
    return {
        "size": size,
        "place": torch.stack([left, top], dim=-1),
        "mirror": some(0.5, 2),
        "angle": uniform(-20, 20, 2).deg2rad() * some(0.6, 2),
        "shear": uniform(-0.2, 0.2, 2) * some(0.5, 2),
        "narrow": 1 - uniform(0, 0.3, 2, 2) * some(0.25, 2, 2),  # width and height
        "ground": ground,
        "slope": uniform(0, 2 * torch.pi),
        "texture": torch.randn(B, 1, 8, 8, generator=generator)
        * uniform(0, 0.12, 1, 1, 1)
        * some(0.2, 1, 1, 1),
        "stripes": uniform(0, 0.15) * some(0.08),
        "pitch": uniform(3, 12),
        "ink": ink,
        "paper": paper,
        "blur": uniform(0, 1) * some(0.3),
        "quality": torch.where(some(0.25), uniform(15, 80), 100.0),
        "saturation": uniform(0.3, 1.6) * ~some(0.15),
        "tint": uniform(0.85, 1.15, 3),
        "contrast": uniform(0.7, 1.2),
        "brightness": uniform(0.8, 1.1),
    }


def affine(plan, layer):
    """Where on its drawing each place of the canvas lies: (B, 2, 3), in -1 … 1."""
    size = plan["size"][:, layer]  # (B,)
    centre = plan["place"][:, layer] + size[:, None] / 2  # (B, 2)
    centre = centre * 2 / SIZE - 1
    one, nought = torch.ones_like(size), torch.zeros_like(size)
    upright, full = torch.zeros(1, layer + 1), torch.ones(1, layer + 1, 2)
    angle = plan.get("angle", upright)[:, layer].expand_as(size)
    shear = plan.get("shear", upright)[:, layer].expand_as(size)
    narrow = plan.get("narrow", full)[:, layer].expand(len(size), 2)
    flip = torch.where(plan["mirror"][:, layer], -one, one)

    def matrix(a, b, c, d):
        return torch.stack([a, b, c, d], dim=-1).view(-1, 2, 2)  # (B, 2, 2)

    cos, sin = angle.cos(), angle.sin()
    forward = matrix(cos, -sin, sin, cos) @ matrix(one, shear, nought, one)
    stretch = (size / SIZE).clamp(min=1e-3)[:, None] * narrow  # (B, 2)
    forward = forward @ matrix(flip * stretch[:, 0], nought, nought, stretch[:, 1])
    back = torch.linalg.inv(forward)  # (B, 2, 2)
    return torch.cat([back, -back @ centre[:, :, None]], dim=2)  # (B, 2, 3)


def compose(atlas, numbers, plan):
    """Lay drawings on their canvases.

    Args:
        atlas: an Atlas.
        numbers: (B, layers) int64 on the CPU, which drawings; -1 for none.
        plan: from `plain_numbers` or `free_numbers`, on the CPU.

    Returns:
        (B, 3, 64, 64) floats in 0 … 1, on the atlas's device.
    """
    B, device = len(numbers), atlas.device
    layers = range(numbers.shape[1])
    theta = torch.stack([affine(plan, layer) for layer in layers]).to(device)
    small = (plan["size"] < SMALL) & (numbers >= 0)  # (B, layers)
    large = (plan["size"] >= SMALL) & (numbers >= 0)  # (B, layers)
    canvas = ground({k: v.to(device) for k, v in plan.items()}, B)  # (B, 3, 64, 64)
    for layer in layers:
        laid = torch.zeros(B, 4, SIZE, SIZE, device=device)
        for chosen, halved in ((small, True), (large, False)):
            where = chosen[:, layer].nonzero()[:, 0]
            if not len(where):
                continue
            which = numbers[where, layer].to(device)
            where = where.to(device)
            source = atlas.half[which].float() / 255
            if not halved:
                source = premultiply(atlas.pixels[which])  # (some, 4, 64, 64)
            grid = nn.functional.affine_grid(
                theta[layer, where], (len(where), 4, SIZE, SIZE), align_corners=False
            )
            laid[where] = nn.functional.grid_sample(source, grid, align_corners=False)
        colour, alpha = laid[:, :3], laid[:, 3:]
        if "ink" in plan:
            inked = atlas.inked[numbers[:, layer].clamp(min=0).to(device)]  # (B,)
            ink, paper = (
                plan[name][:, layer, :, None, None].to(device)
                for name in ("ink", "paper")
            )
            in_ink = ink * (alpha - colour) + paper * colour
            colour = torch.where(inked[:, None, None, None], in_ink, colour)
        canvas = canvas * (1 - alpha) + colour
    return canvas.clamp(0, 1)


def ground(plan, B):
    """What the drawings lie on: (B, 3, 64, 64)."""
    first, second = plan["ground"][:, :, :, None, None].unbind(dim=1)  # (B, 3, 1, 1)
    if "slope" not in plan:
        return first.expand(B, 3, SIZE, SIZE)
    line = torch.linspace(-1, 1, SIZE, device=first.device)
    slope = plan["slope"][:, None, None]  # (B, 1, 1)
    along = line[None, None, :] * slope.cos() + line[None, :, None] * slope.sin()
    share = (along / 2.8 + 0.5).clamp(0, 1)[:, None]  # (B, 1, 64, 64)
    stripes = (along * plan["pitch"][:, None, None] * torch.pi).sin().sign()
    uneven = stripes * plan["stripes"][:, None, None]  # (B, 64, 64)
    noise = nn.functional.interpolate(plan["texture"], SIZE, mode="bilinear")
    return first * (1 - share) + second * share + uneven[:, None] + noise


def blurred(pictures):
    """A 5 x 5 binomial blur."""
    taps = torch.tensor([1.0, 4, 6, 4, 1], device=pictures.device) / 16
    weight = taps.expand(3, 1, 1, 5)
    padded = nn.functional.pad(pictures, (2, 2, 2, 2), mode="replicate")
    rows = nn.functional.conv2d(padded, weight, groups=3)
    return nn.functional.conv2d(rows, weight.transpose(2, 3), groups=3)


def jpeg(pictures, quality):
    """What JPEG would leave of pictures, its loss without its file: (B, 3, H, W)."""
    device = pictures.device
    place = torch.arange(8, device=device).float()
    cosines = torch.cos((2 * place[None] + 1) * place[:, None] * torch.pi / 16) / 2
    cosines[0] /= 2**0.5  # (8, 8), the discrete cosine transform
    tables = [[float(n) for n in t.split()] for t in (BRIGHTNESS, COLOUR, COLOUR)]
    tables = torch.tensor(tables, device=device).view(3, 8, 8)
    scale = torch.where(quality < 50, 50 / quality, 2 - quality / 50)  # (B,)
    step = (tables * scale[:, None, None, None]).round().clamp(min=1) / 255
    step = step[:, :, None, None]  # (B, 3, 1, 1, 8, 8)
    to_ycc = torch.tensor(
        [[0.299, 0.587, 0.114], [-0.1687, -0.3313, 0.5], [0.5, -0.4187, -0.0813]],
        device=device,
    )
    middle = torch.tensor([128 / 255, 0, 0], device=device).view(3, 1, 1)
    ycc = torch.einsum("yc,bchw->byhw", to_ycc, pictures) - middle
    blocks = rearrange(ycc, "b c (i y) (j x) -> b c i j y x", y=8, x=8)
    waves = cosines @ blocks @ cosines.T
    waves = (waves / step).round() * step
    ycc = rearrange(cosines.T @ waves @ cosines, "b c i j y x -> b c (i y) (j x)")
    back = torch.linalg.inv(to_ycc)
    return torch.einsum("cy,byhw->bchw", back, ycc + middle).clamp(0, 1)


def weather(pictures, plan):
    """Blur, JPEG, saturation, tint, contrast and brightness, as the plan has them."""
    soft = plan["blur"].nonzero()[:, 0]
    plan = {name: numbers.to(pictures.device) for name, numbers in plan.items()}
    if len(soft):
        soft = soft.to(pictures.device)
        share = plan["blur"][soft, None, None, None]
        some = pictures[soft]
        pictures = pictures.index_copy(
            0, soft, some * (1 - share) + blurred(some) * share
        )
    grey = pictures.mean(dim=1, keepdim=True)  # (B, 1, H, W)

    def number(name):
        return plan[name].view(len(pictures), -1, 1, 1)

    tinted = (grey + (pictures - grey) * number("saturation")) * number("tint")
    middle = tinted.mean(dim=(1, 2, 3), keepdim=True)
    toned = (tinted - middle) * number("contrast") + middle * number("brightness")
    pictures = toned.clamp(0, 1)
    coarse = (plan["quality"] < 100).nonzero()[:, 0]
    if len(coarse):
        worn = jpeg(pictures[coarse], plan["quality"][coarse])
        pictures = pictures.index_copy(0, coarse, worn)
    return pictures


def some_scenes(atlas, seed, n, pairs=0.4):
    """(B, 3, 64, 64) pictures of things by lot, to look at and to time."""
    rng = np.random.default_rng(seed)
    things, numbers, relations = list(atlas.of), [], []
    for _ in range(n):
        relation = str(rng.choice(RELATIONS)) if rng.random() < pairs else None
        chosen = [atlas.pick(rng, str(thing)) for thing in rng.choice(things, 2)]
        numbers.append(chosen if relation else [chosen[0], -1])
        relations.append(relation)
    plan = free_numbers(torch.Generator().manual_seed(seed), relations)
    return weather(compose(atlas, torch.tensor(numbers), plan), plan)


def per_second(make, seconds=5):
    """Scenes a second: `make`, called with 0, 1, 2, …, returns how many it made."""
    started, n, calls = time.perf_counter(), 0, 0
    while time.perf_counter() - started < seconds:
        n += make(calls)
        calls += 1
    return round(n / (time.perf_counter() - started))


def measure_pace(atlas):
    """Scenes a second, and training steps of the tiny CLIP a second, for both ways.

    With Pillow a scene is placed as chapter 7 does, and nothing more. A step trains on
    a batch as large as tools/weights/train_eyes.py has it at first.
    """
    import open_clip

    from tools.weights.train_eyes import make_optimizers, training_step

    rng, drawings = np.random.default_rng(0), []
    for i in range(200):
        pixels = atlas.pixels[i].permute(1, 2, 0).cpu().numpy()
        drawings.append(Image.fromarray(pixels, "RGBA"))

    def with_pillow(n):
        relation = RELATIONS[n % 2] if n % 5 < 2 else None
        some = [drawings[i] for i in rng.integers(0, 200, 2 if relation else 1)]
        draw_scene(rng, some, relation)
        return 1

    def as_tensors(n):
        return len(some_scenes(atlas, n, 156))

    scenes = {
        "with Pillow": per_second(with_pillow),
        "as tensors": per_second(as_tensors),
    }
    folder = DATA / "tiny_clip"
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["vision_cfg"]["patch_dropout"] = 0.5
    model = open_clip.CLIP(**config).to(atlas.device)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    optimizers, captions = make_optimizers(model, 1e-3), [f"a {t}" for t in atlas.of]
    pixels = some_scenes(atlas, 0, 156) * 2 - 1
    started, n_steps = time.perf_counter(), 0
    while time.perf_counter() - started < 20:
        training_step(model, tokenizer, optimizers, pixels, captions[:156]).item()
        n_steps += 1
    step = (time.perf_counter() - started) / n_steps
    steps = {how: round(1 / (156 / pace + step), 3) for how, pace in scenes.items()}
    steps["if drawing took no time"] = round(1 / step, 3)
    return {
        "scenes a second": scenes,
        "steps a second, 156 scenes each": steps,
        "on": {"threads": torch.get_num_threads(), "device": str(atlas.device)},
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write a sheet of scenes")
    parser.add_argument("--time", action="store_true", help="measure both ways")
    parser.add_argument("--json", type=Path, help="write there what --time found")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    rows = read_rows(DATA / "emoji", DATA / "hands")
    rows = [row for row in rows if row["trained"]]
    atlas = Atlas(rows)
    print(f"{len(atlas.pixels)} drawings of {len(atlas.of)} things")
    if args.out:
        pictures = some_scenes(atlas, args.seed, 60)
        sheet = rearrange(pictures, "(i j) c y x -> (i y) (j x) c", j=12)
        Image.fromarray((sheet * 255).byte().numpy()).resize((1536, 640)).save(args.out)
    if args.time:
        pace = measure_pace(atlas)
        for what, numbers in pace.items():
            print(what, numbers)
        if args.json:
            args.json.write_text(json.dumps(pace, indent=1) + "\n")


if __name__ == "__main__":
    main()
