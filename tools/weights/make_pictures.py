#!/usr/bin/env python3
"""Rasterise the drawings in data/: nine studios' emoji, and other hands.

data/emoji holds the emoji; data/hands silhouettes and line drawings of icon sets, and
clip art by many artists. Both are imagefolders with metadata.jsonl. A reader never
needs this: the pictures are committed. To make them again, install the npm packages
that `data/README.md` lists, `resvg-py` from PyPI and, for the clip art, Debian's
`openclipart-png`, then

    npm install --prefix FOLDER $(python tools/weights/make_pictures.py --packages)
    python tools/weights/make_pictures.py FOLDER/node_modules/@iconify-json

Same packages, same pictures: nothing here is random. Which icon and which clip art
shows what was found by name and then by looking: `tools/weights/hands.json`.
"""

import argparse
import io
import json
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import ROOT

SIZE = 64  # pixels; drawings are fitted into a square

# studio -> (npm package and version, trained on?)
STUDIOS = {
    "noto": ("@iconify-json/noto@1.2.9", True),
    "noto-v1": ("@iconify-json/noto-v1@1.2.5", True),
    "fluent": ("@iconify-json/fluent-emoji@1.2.7", True),
    "fluent-flat": ("@iconify-json/fluent-emoji-flat@1.2.6", True),
    "fxemoji": ("@iconify-json/fxemoji@1.2.2", True),
    "emojione": ("@iconify-json/emojione@1.2.3", True),
    "emojione-v1": ("@iconify-json/emojione-v1@1.2.3", True),
    "twemoji": ("@iconify-json/twemoji@1.2.5", False),
    "openmoji": ("@iconify-json/openmoji@1.2.29", False),
}

# Sets of silhouettes and line drawings, in one ink but for streamline-emojis.
ICON_SETS = """
fluent-emoji-high-contrast@1.2.6 emojione-monotone@1.2.1 streamline-emojis@1.2.4
game-icons@1.2.4 mdi@1.2.3 icon-park@1.2.4 icon-park-solid@1.2.4 ph@1.2.2 lucide@1.2.137
hugeicons@1.2.35 tabler@1.2.41 mingcute@1.2.8 fa6-solid@1.2.4"""
CLIP_ART = Path("/usr/share/openclipart/png")  # openclipart-png 1:0.18+dfsg-19

# "icon" or "icon=name we say". Named things have captions; the others are kept for
# few-shot chapters, where a prompt gives them a made-up name.
NAMED = """
bear baby-chick=chick cow-face=cow crocodile dog-face=dog dolphin elephant frog
horse-face=horse koala lady-beetle=ladybug octopus panda penguin pig-face=pig
rabbit-face=rabbit snail snake spider tiger-face=tiger turtle spouting-whale=whale
honeybee=bee cat-face=cat mouse-face=mouse monkey-face=monkey tropical-fish=fish
flamingo butterfly owl fox lion parrot shark
cactus palm-tree sunflower tulip rose mushroom maple-leaf christmas-tree
four-leaf-clover=clover
banana birthday-cake chocolate-bar cookie doughnut eggplant hamburger lemon lollipop
peach pear pineapple pizza red-apple green-apple strawberry tomato watermelon
wine-glass beer-mug soft-ice-cream=ice-cream ear-of-corn=corn-cob hot-beverage=hot-drink
airplane ambulance bus bicycle sailboat rocket tractor helicopter tent volcano rainbow
snowman-without-snow=snowman umbrella-with-rain-drops=umbrella house-with-garden=house
fire star crescent-moon=moon
alarm-clock anchor balloon bell crown camera light-bulb pencil gem-stone=gem
heart-suit=heart soccer-ball basketball trophy jack-o-lantern=pumpkin wrapped-gift=gift
guitar violin trumpet hammer key top-hat t-shirt=shirt dress backpack toilet
television telephone game-die=dice bomb umbrella-on-ground=beach-umbrella
"""
UNNAMED = """
ant boar bug camel cat=whole-cat dog=whole-dog dove dragon-face goat hamster leopard
blowfish poodle ram rat rooster ox water-buffalo hatching-chick chipmunk wolf
cow=whole-cow pig=whole-pig rabbit=whole-rabbit whale=blue-whale spiral-shell spider-web
paw-prints
hibiscus white-flower blossom cherry-blossom bouquet seedling deciduous-tree herb
fallen-leaf sheaf-of-rice rosette
bread candy cherries chestnut cooked-rice custard dango french-fries fried-shrimp grapes
hot-pepper ice-cream=sundae melon honey-pot meat-on-bone poultry-leg oden rice-ball
shaved-ice shortcake spaghetti sushi tangerine tropical-drink cocktail-glass baby-bottle
bento-box roasted-sweet-potato fish-cake-with-swirl kitchen-knife
american-football artist-palette baseball bowling carp-streamer crystal-ball
fishing-pole tennis ticket wind-chime slot-machine pool-8-ball ribbon
military-medal joystick sparkler club-suit spade-suit skis
battery blue-book briefcase calendar candle clapper-board scissors closed-umbrella
computer-disk couch-and-lamp credit-card door electric-plug envelope floppy-disk glasses
graduation-cap handbag headphone high-heeled-shoe jeans lipstick locked
magnifying-glass-tilted-left=magnifying-glass megaphone microscope money-bag
musical-note necktie newspaper nut-and-bolt open-book package paintbrush pill postbox
ring round-pushpin running-shoe saxophone scroll syringe telescope wrench womans-hat
barber-pole carousel-horse church cloud droplet factory ferris-wheel fire-engine
fountain fuel-pump hourglass-not-done=hourglass locomotive motorcycle mount-fuji
police-car roller-coaster sun-with-face snowflake statue-of-liberty thermometer tornado
vertical-traffic-light=traffic-light watch hot-springs racing-car
"""


def things():
    """[(icon, name, is_named)], names with spaces, each name once."""
    rows = []
    for block, is_named in ((NAMED, True), (UNNAMED, False)):
        for word in block.split():
            icon, _, name = word.partition("=")
            rows.append((icon, (name or icon).replace("-", " "), is_named))
    names = [name for _, name, _ in rows]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SystemExit(f"named twice: {sorted(twice)}")
    return rows


def svg(icons, icon):
    """The SVG text of one icon, or None where this studio did not draw it."""
    for key in (icon, icon.replace("-", "")):  # fxemoji writes names in one word
        body = icons["icons"].get(
            icons.get("aliases", {}).get(key, {}).get("parent", key)
        )
        if body:
            width = body.get("width", icons.get("width", 16))
            height = body.get("height", icons.get("height", 16))
            box = f"{body.get('left', 0)} {body.get('top', 0)} {width} {height}"
            ns = (
                'xmlns="http://www.w3.org/2000/svg" '
                'xmlns:xlink="http://www.w3.org/1999/xlink"'
            )
            size = f'width="{SIZE}" height="{SIZE}" viewBox="{box}"'
            return f"<svg {ns} {size}>{body['body']}</svg>"
    return None


def rasterise(text):
    """A SIZE x SIZE RGBA picture, cropped to what is drawn and centred again."""
    import resvg_py
    from PIL import Image

    big = bytes(resvg_py.svg_to_bytes(svg_string=text, width=4 * SIZE, height=4 * SIZE))
    return cropped(Image.open(io.BytesIO(big)).convert("RGBA"))


def cropped(picture):
    """Cut away the margin that was left round a large drawing, and shrink to SIZE."""
    from PIL import Image

    box = picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    if box is None:
        raise SystemExit("an icon came out empty")
    picture = picture.crop(box)
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def article(name):
    """The name with a or an."""
    return f"{'an' if name[0] in 'aeiou' and name != 'unicorn' else 'a'} {name}"


def read_icons(folder, package):
    """icons.json of an npm package of the wanted version."""
    name, _, wanted = package.rpartition("@")
    folder = folder / name.split("/")[-1]
    version = json.loads((folder / "package.json").read_text())["version"]
    if version != wanted:
        raise SystemExit(f"{folder.name}: want {package}, found {version}")
    return json.loads((folder / "icons.json").read_text())


def clear_ground(picture):
    """RGBA, and a plain opaque ground, reached from the corners, made transparent."""
    from PIL import Image, ImageDraw

    picture = picture.convert("RGBA")
    if picture.getchannel("A").getextrema()[0] < 255:
        return picture
    flat, mark = picture.convert("RGB"), (255, 0, 254)
    right, bottom = flat.width - 1, flat.height - 1
    for corner in ((0, 0), (right, 0), (0, bottom), (right, bottom)):
        if min(flat.getpixel(corner)) > 235:  # nearly white
            ImageDraw.floodfill(flat, corner, mark, thresh=30)
    alpha = [0 if pixel == mark else 255 for pixel in flat.get_flattened_data()]
    mask = Image.new("L", flat.size)
    mask.putdata(alpha)
    picture.putalpha(mask)
    return picture


def is_trained_artist(artist):
    """Half of the clip art's artists, by a hash of the name; the others are a test."""
    return zlib.crc32(f"a{artist}".encode()) % 2 == 0


def make_hands(icons_folder, out):
    """data/hands: silhouettes in one ink, and clip art split by artist."""
    from PIL import Image

    hands = json.loads(Path(__file__).with_name("hands.json").read_text())
    named = {name: is_named for _, name, is_named in things()}
    rows = []

    def keep(picture, hand, sort, name, number, trained, **how):
        folder = out / hand.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        file_name = f"{folder.name}/{name.replace(' ', '_')}_{number}.webp"
        picture.save(out / file_name, method=6, **how)
        row = {"file_name": file_name, "text": article(name), "thing": name}
        row |= {"studio": hand, "sort": sort, "named": named[name], "trained": trained}
        rows.append(row)

    for package in ICON_SETS.split():
        studio = package.split("@")[0]
        icons = read_icons(icons_folder, package)
        coloured = studio == "streamline-emojis"
        sort, how = "silhouette", {"lossless": True}
        if coloured:
            sort, how = "emoji", {"quality": 90}
        for name, chosen in hands["icon sets"][studio].items():
            for number, icon in enumerate(chosen, 1):
                picture = rasterise(svg(icons, icon))
                if not coloured:  # an ink and its paper: brightness says which
                    grey, alpha = picture.convert("L"), picture.getchannel("A")
                    picture = Image.merge("RGBA", [grey, grey, grey, alpha])
                keep(picture, studio, sort, name, number, True, **how)
    for name, chosen in hands["openclipart"].items():
        for number, (file, artist) in enumerate(chosen, 1):
            if artist == "unknown":
                continue  # could be by an artist of the other half
            with Image.open(CLIP_ART / file) as picture:
                drawing = cropped(clear_ground(picture))
            trained = is_trained_artist(artist)
            keep(drawing, artist, "clip art", name, number, trained, quality=90)
    return rows


def write_listing(out, rows):
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "metadata.jsonl").write_text(lines)
    shown = {row["thing"] for row in rows}
    print(f"{out}: {len(rows)} pictures of {len(shown)} things")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("icons", nargs="?", type=Path, help="the @iconify-json folder")
    parser.add_argument("--out", type=Path, default=ROOT / "data")
    parser.add_argument(
        "--packages", action="store_true", help="print the npm packages"
    )
    args = parser.parse_args()
    if args.packages:
        sets = [f"@iconify-json/{package}" for package in ICON_SETS.split()]
        print(*(package for package, _ in STUDIOS.values()), *sets)
        return
    if args.icons is None or not args.icons.is_dir():
        parser.error("name the @iconify-json folder (see --help)")

    rows, out = [], args.out / "emoji"
    for studio, (package, trained) in STUDIOS.items():
        icons = read_icons(args.icons, package)
        (out / studio).mkdir(parents=True, exist_ok=True)
        for icon, name, is_named in things():
            text = svg(icons, icon)
            if text is None:
                continue
            file_name = f"{studio}/{name.replace(' ', '_')}.webp"
            rasterise(text).save(out / file_name, quality=90, method=6)
            row = {"file_name": file_name, "text": article(name), "thing": name}
            row |= {"studio": studio, "named": is_named, "trained": trained}
            rows.append(row)
    write_listing(out, rows)
    write_listing(args.out / "hands", make_hands(args.icons, args.out / "hands"))


if __name__ == "__main__":
    main()
