"""The drawings that several chapters share. Not part of the package."""

import base64
import html
import io
import re
import textwrap

import matplotlib.pyplot as plt
from IPython import get_ipython
from IPython.display import HTML, display
from matplotlib.patches import FancyBboxPatch
from matplotlib_inline.backend_inline import set_matplotlib_formats

PINK, PALE, GREY, INK = "#d6336c", "#fbe3ec", "#e9ecef", "#343a40"
# Right and wrong, on every page, with a mark beside: no other meaning has these two.
RIGHT, WRONG = "#087f5b", "#c2410c"

if get_ipython() is not None:  # in a notebook, twice the pixels in the same size
    set_matplotlib_formats("retina")

# name -> (left, bottom, width, height, label, shape that comes out)
BLOCKS = {
    "data": (0.0, 0.9, 1.6, 2.4, "pictures\nand text", ""),
    "vision": (2.3, 2.4, 1.8, 0.9, "CLIP\nfeatures", "(B, T_img, F, v, d_img)"),
    "perceiver": (5.0, 2.4, 1.8, 0.9, "Perceiver\nResampler", "(B, T_img, n, d_img)"),
    "cross_attention": (6.6, 0.9, 1.9, 0.9, "gated masked\ncross-attention", ""),
    "lm": (8.9, 0.9, 1.9, 0.9, "language model\nlayer (frozen)", ""),
    "loss": (12.0, 0.9, 1.3, 0.9, "shifted\nloss", ""),
}
ARROWS = [
    ((1.6, 2.85), (2.3, 2.85)),
    ((4.1, 2.85), (5.0, 2.85)),
    ((6.8, 2.85), (7.55, 1.82)),
    ((1.6, 1.35), (6.6, 1.35)),
    ((8.5, 1.35), (8.9, 1.35)),
    ((10.8, 1.35), (12.0, 1.35)),
]


def flamingo_map(lit):
    """Draw the whole model with one part lit: "you are here".

    Args:
        lit: "data", "vision", "perceiver", "cross_attention", "layers", "model",
            "loss", "generation" (the way back), or "training" (everything).
    """
    frames = {"layers": (6.35, 0.65, 4.7, 1.4), "model": (1.95, 0.35, 9.35, 3.2)}
    known = {*BLOCKS, *frames, "training", "generation"} - {"lm"}
    if lit not in known:
        raise ValueError(f"no part {lit!r}; there are {', '.join(sorted(known))}")
    fig, ax = plt.subplots(figsize=(8.6, 2.9), facecolor="white")
    for name, (left, bottom, width, height) in frames.items():
        on = lit in (name, "training")
        box = FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.15",
            facecolor=PALE if on else "none",
            edgecolor=PINK if on else "#adb5bd",
            linewidth=2 if on else 1,
            linestyle="-" if on else ":",
            zorder=0 if name == "model" else 1,
        )
        ax.add_patch(box)
    ax.text(10.95, 2.15, "Flamingo layers", ha="right", fontsize=9, color=INK)
    ax.text(2.0, 0.08, "Flamingo", fontsize=9, color=INK)
    for name, (left, bottom, width, height, label, shape) in BLOCKS.items():
        on = lit in (name, "training") and name != "lm"
        box = FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0.02,rounding_size=0.12",
            facecolor=PINK if on else GREY,
            edgecolor=PINK if on else "#adb5bd",
            zorder=2,
        )
        ax.add_patch(box)
        middle = (left + width / 2, bottom + height / 2)
        colour = "white" if on else INK
        ax.text(
            *middle, label, ha="center", va="center", fontsize=9, color=colour, zorder=3
        )
        ax.text(
            middle[0] - {"perceiver": 0.36, "vision": 0.07}.get(name, 0),  # apart
            bottom - 0.28,
            shape,
            ha="center",
            fontsize=9,
            color=INK,
            zorder=3,
        )
    for start, end in ARROWS:
        arrow = {"arrowstyle": "->", "color": INK, "lw": 1.2}
        ax.annotate("", end, start, arrowprops=arrow, zorder=3)
    if lit == "generation":
        way_back = {"arrowstyle": "->", "color": PINK, "lw": 2.5, "shrinkA": 0}
        way_back["connectionstyle"] = "bar,angle=180,fraction=-0.11"
        ax.annotate("", (0.8, 0.85), (11.45, 0.85), arrowprops=way_back, zorder=3)
        text = {"s": "append the next token", "ha": "center", "fontsize": 9}
        ax.text(6.1, -0.62, color=PINK, **text)
    ax.text(11.67, 1.45, "logits", ha="center", fontsize=9, color=INK)
    ax.text(4.1, 1.45, "text (B, T_txt, d_txt)", ha="center", fontsize=9, color=INK)
    ax.set_xlim(-0.1, 13.4)
    ax.set_ylim(-0.8 if lit == "generation" else 0, 3.7)
    ax.axis("off")
    fig.tight_layout()
    plt.show()


def verdict(said, wanted):
    """What was said with ✓ or ✗ before it, and the truth under it if it is wrong.

    Returns:
        (title, colour), the colour RIGHT or WRONG.
    """
    if said == wanted:
        return f"✓ {said}", RIGHT
    return f"✗ {said}\n({wanted})", WRONG


def show_pictures(
    pictures, titles=None, columns=6, colours=None, size=1.5, wanted=None
):
    """Show pictures in rows, each with a title under which a reader can check it.

    Args:
        pictures: PIL pictures.
        titles: a string for each.
        columns: pictures in a row.
        colours: of the titles, a name for each.
        size: inches for a picture's side.
        wanted: what each title should be; each is then marked as right or wrong.
    """
    if wanted is not None:
        marked = [verdict(*both) for both in zip(titles, wanted, strict=True)]
        titles, colours = zip(*marked, strict=True)
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    if titles:  # what does not fit above a picture goes on in another line
        fits = round(14 * size)  # characters
        titles = [
            "\n".join(textwrap.fill(line, fits) for line in title.split("\n"))
            for title in titles
        ]
    lines = max((t.count("\n") + 1 for t in titles), default=0) if titles else 0
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(columns * size, rows * (size + 0.2 * lines)),
        facecolor="white",
        squeeze=False,
    )
    for ax in axes.flat:
        ax.axis("off")
    for i, (ax, picture) in enumerate(zip(axes.flat, pictures, strict=False)):
        ax.imshow(picture)
        if titles:
            colour = colours[i] if colours else INK
            ax.set_title(titles[i], fontsize=9, color=colour)
    fig.tight_layout()
    plt.show()


def show_mask(may_look, words, columns=None):
    """Draw who may look at which picture: one row for a word, one column for a picture.

    Args:
        may_look: (T_txt, T_img) bool.
        words: T_txt strings.
        columns: T_img strings; "image 1", … when None.
    """
    T_txt, T_img = may_look.shape
    columns = columns or [f"image {i}" for i in range(1, T_img + 1)]
    fig, ax = plt.subplots(
        figsize=(1.4 + 0.9 * T_img, 0.6 + 0.28 * T_txt), facecolor="white"
    )
    ax.imshow(may_look.float(), cmap="RdPu", vmin=0, vmax=1.4, aspect="auto")
    ax.set_xticks(range(T_img), columns, fontsize=9)
    ax.set_yticks(range(T_txt), words, fontsize=9)
    ax.xaxis.tick_top()
    for edge in range(1, max(T_txt, T_img)):
        ax.axhline(edge - 0.5, color="white", lw=1.5)
        if edge < T_img:
            ax.axvline(edge - 0.5, color="white", lw=1.5)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    fig.tight_layout()
    plt.show()


def show_film(frames, alt, seconds=0.5):
    """Show pictures one after the other, again and again, in the page itself.

    Args:
        frames: PIL pictures of one size.
        alt: what is to be seen, in words.
        seconds: how long each frame stays.
    """
    file = io.BytesIO()
    frames[0].save(
        file,
        "GIF",
        save_all=True,
        append_images=frames[1:],
        duration=int(1000 * seconds),
        loop=0,
    )
    data = base64.b64encode(file.getvalue()).decode()
    style = "width:160px;image-rendering:pixelated;border:1px solid #adb5bd"
    image = f'<img alt="{alt}" style="{style}" src="data:image/gif;base64,{data}">'
    display(HTML(image))


MARKS = {"✓": ' class="right"', "✗": ' class="wrong"'}


class table:
    """Rows as a table of the page; where there is no page, as lined-up text.

    The last line of a cell: `table([("lemon", 12), ("cow", 7)], ("thing", "right"))`.
    A number stands at the right of its column. How many digits it has is yours to say:
    `f"{loss:.2f}"`. A cell that begins with ✓ or ✗ has its colour.

    Args:
        rows: sequences of strings or numbers, one for each row, all of one length.
        header: a string for each column.

    Raises:
        ValueError: a row has more or fewer cells than the header.
    """

    def __init__(self, rows, header):
        self.header = [str(cell) for cell in header]
        self.rows = [[str(cell) for cell in row] for row in rows]
        for number, row in enumerate(self.rows):
            if len(row) != len(self.header):
                raise ValueError(
                    f"row {number} has {len(row)} cells, the header {len(self.header)}"
                )
        columns = zip(*self.rows, strict=True)
        self.is_number = [all(map(is_number, column)) for column in columns]
        self.is_number = self.is_number or [False] * len(self.header)

    def __repr__(self):
        lines = [self.header, *self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rule = ["-" * width for width in widths]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if right else cell.ljust(width)
                for cell, width, right in zip(line, widths, self.is_number, strict=True)
            ).rstrip()
            for line in (self.header, rule, *self.rows)
        )

    def _repr_html_(self):
        def line(cells, tag):
            style = [' style="text-align: right"' * right for right in self.is_number]
            marks = [MARKS.get(cell[:1], "") for cell in cells]
            return "".join(
                f"<{tag}{mark}{side}>{html.escape(cell)}</{tag}>"
                for mark, side, cell in zip(marks, style, cells, strict=True)
            )

        head = line(self.header, "th")
        body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        head = f"<thead>\n<tr>{head}</tr>\n</thead>"
        return f'<table class="table">\n{head}\n<tbody>\n{body}\n</tbody>\n</table>'


def is_number(text):
    """True if a table's cell holds a number: 0.21, 1,200, 87 %, ×3, −5; or a dash."""
    return re.fullmatch(r"[-−–+×≈<~]?\s?[\d.,]*\s?(%|[x×])?", text.strip()) is not None
