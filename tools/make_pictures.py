#!/usr/bin/env python3
"""Rasterise nine studios' emoji into data/emoji, an imagefolder with metadata.jsonl.

A reader never needs this: the pictures are committed. To make them again, install the
nine npm packages that `data/README.md` lists, and `resvg-py` from PyPI, then

    npm install --prefix /some/folder $(python tools/make_pictures.py --packages)
    python tools/make_pictures.py /some/folder/node_modules/@iconify-json

Same packages, same pictures: nothing here is random.
"""

import argparse
import io
import json
from pathlib import Path

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

    # Draw large, cut away the margin that the studio left, and shrink to SIZE.
    big = bytes(resvg_py.svg_to_bytes(svg_string=text, width=4 * SIZE, height=4 * SIZE))
    picture = Image.open(io.BytesIO(big)).convert("RGBA")
    box = picture.getchannel("A").point(lambda a: 255 * (a > 16)).getbbox()
    if box is None:
        raise SystemExit("an icon came out empty")
    picture = picture.crop(box)
    side = max(picture.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("icons", nargs="?", type=Path, help="the @iconify-json folder")
    parser.add_argument("--out", type=Path, default=Path("data/emoji"))
    parser.add_argument(
        "--packages", action="store_true", help="print the npm packages"
    )
    args = parser.parse_args()
    if args.packages:
        print(*(package for package, _ in STUDIOS.values()))
        return
    if args.icons is None or not args.icons.is_dir():
        parser.error("name the @iconify-json folder (see --help)")

    rows = []
    for studio, (package, trained) in STUDIOS.items():
        folder = args.icons / package.split("/")[1].split("@")[0]
        icons = json.loads((folder / "icons.json").read_text())
        version = json.loads((folder / "package.json").read_text())["version"]
        if version != package.rsplit("@", 1)[1]:
            raise SystemExit(f"{folder.name}: want {package}, found {version}")
        (args.out / studio).mkdir(parents=True, exist_ok=True)
        for icon, name, is_named in things():
            text = svg(icons, icon)
            if text is None:
                continue
            file_name = f"{studio}/{name.replace(' ', '_')}.webp"
            rasterise(text).save(args.out / file_name, quality=90, method=6)
            article = "an" if name[0] in "aeiou" and name != "unicorn" else "a"
            rows.append(
                {
                    "file_name": file_name,
                    "text": f"{article} {name}",
                    "thing": name,
                    "studio": studio,
                    "named": is_named,
                    "trained": trained,
                }
            )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (args.out / "metadata.jsonl").write_text(lines)
    print(f"{len(rows)} pictures of {len(things())} things")


if __name__ == "__main__":
    main()
