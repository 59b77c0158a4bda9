"""What the page shows, as HTML. Every picture is inside of it, so no file is left on disk."""

import base64
import io
from collections.abc import Sequence
from html import escape

import cv2
import numpy as np
from PIL import Image

from ..pipelines.engine import Generation
from ..preview import draw_kept
from ..selection import Kept, Selection

CARD = 448  # pixels of the longer side of an overlay: twice what a card takes on a screen
CELL = 384  # of a picture in a grid


def data_uri(picture: Image.Image, format: str = "PNG") -> str:
    """A picture as an address that holds it. "JPEG" is for what is only looked at."""
    file = io.BytesIO()
    picture.save(file, format, **({"quality": 88, "subsampling": 0} if format == "JPEG" else {}))
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def text_uri(text: str) -> str:
    """A text file of JSON as an address that holds it."""
    return f"data:application/json;base64,{base64.b64encode(text.encode()).decode('ascii')}"


def card(number: int, name: str, kept: Kept) -> str:
    """A reference with its kept tokens drawn over it, and what they are.

    number: of the reference, from 1, as prompts count them.
    """
    assert kept.picture is not None  # the app has pixels of every reference
    size = kept.total
    overview = f", overview by {kept.overview.factor}" if kept.overview else ""
    said = f"{kept.count} of {size} tokens{overview}"
    by = "" if kept.count == size else f" by {kept.selector}"
    drawn = draw_kept(_enlarged(kept.picture), kept)
    counts = f"<span class=count>{said}</span><span class=by>{escape(kept.selector)}</span>"
    return _figure(number, name, drawn, f": {said} kept{by}", counts)


def bare_card(number: int, name: str, picture: Image.Image) -> str:
    """A reference alone, where nothing can be chosen of it. number: as in `card`."""
    return _figure(number, name, Image.fromarray(_enlarged(np.asarray(picture.convert("RGB")))), "", "")


def _figure(number: int, name: str, drawn: Image.Image, said: str, counts: str) -> str:
    alt = escape(f"Image {number}, {name}{said}", quote=True)
    return (
        f'<figure class="overlay"><img src="{data_uri(drawn, "JPEG")}" alt="{alt}">'
        f"<figcaption><b>{number}</b> <span class=name>{escape(name)}</span>{counts}</figcaption></figure>"
    )


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    """Pixels (H, W, 3) at the size of a card."""
    height, width = pixels.shape[:2]
    scale = CARD / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA)


def summary(selection: Selection) -> str:
    """What is kept of all references, and what the report says besides."""
    share = selection.kept / max(1, selection.total)
    remarks = "".join(f"<br>{escape(remark)}" for remark in selection.remarks)
    return f"<p class=summary><b>{selection.kept}</b> of {selection.total} tokens kept ({share:.0%}){remarks}</p>"


def problem(text: str) -> str:
    """What does not fit, in place of the counts."""
    return f"<p class=problem role=alert>{escape(text)}</p>"


def progress(done: float, of: int, text: str) -> str:
    """A bar, which screen readers tell too."""
    return (
        f'<p class=progress role=status><progress value="{done}" max="{max(1, of)}" aria-label="{escape(text, True)}">'
        f"</progress> <span>{escape(text)}</span></p>"
    )


def picture(generation: Generation, said: str) -> str:
    """A picture alone, where there is nothing to compare it with."""
    source = data_uri(generation.image)
    return f'<figure class="result"><img src="{source}" alt="{escape(said, True)}">{_download(source)}</figure>'


def comparison(dense: Generation, sparse: Generation) -> str:
    """Both pictures at one place, and a slider between them, which keys and fingers move too."""
    width, height = sparse.image.size
    left, right = data_uri(dense.image), data_uri(sparse.image)
    move = "this.parentElement.style.setProperty('--split', this.value + '%')"
    return (
        f'<figure class="result"><div class="compare" style="--split: 50%; aspect-ratio: {width} / {height}">'
        f'<img src="{left}" alt="The image made with all tokens">'
        f'<img class="upper" src="{right}" alt="The image made with the kept tokens">'
        '<span class="tag left">all tokens</span><span class="tag right">kept tokens</span><span class="line"></span>'
        f'<input type="range" min="0" max="100" value="50" oninput="{move}" '
        'aria-label="Percentage of the image with all tokens that is shown, from the left"></div>'
        f"{_download(right)}</figure>"
    )


def _download(source: str) -> str:
    return links([("Download image (PNG)", "sparse-context.png", source)])


def figures(sparse: Generation, dense: Generation | None) -> str:
    """Times, tokens and memory, and how many times faster the sparse call was."""
    selection = sparse.selection
    rows = [] if dense is None else [_row("all tokens", dense, selection.total if selection else None)]
    rows.append(_row("kept tokens" if selection else "no references", sparse, selection.kept if selection else None))
    speedup = (
        "" if dense is None else f"<p class=speedup><b>{dense.times.total / sparse.times.total:.2f}x</b> as fast</p>"
    )
    head = "".join(f"<th scope=col>{name}</th>" for name in ("", "seconds", "denoising", "tokens", "memory"))
    table = f"<table class=figures><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"{speedup}<div class=wide>{table}</div>"


def _row(name: str, generation: Generation, tokens: int | None) -> str:
    memory = "" if generation.memory is None else f"{generation.memory / 2**20:,.0f} MiB"
    cells = (
        f"{generation.times.total:.2f}",
        f"{generation.times.denoise:.2f}",
        "" if tokens is None else tokens,
        memory,
    )
    return f"<tr><th scope=row>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"


def grid(columns: Sequence[str], rows: Sequence[str], cells: Sequence[Sequence[str | None]]) -> str:
    """A table of pictures, row by row; None for those that are still to come."""
    head = "".join(f"<th scope=col>{escape(name)}</th>" for name in ("", *columns))
    body = ""
    for name, line in zip(rows, cells, strict=True):
        body += (
            f"<tr><th scope=row>{escape(name)}</th>" + "".join(f"<td>{shown or ''}</td>" for shown in line) + "</tr>"
        )
    return f"<div class='wide grid' tabindex=0><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def cell(generation: Generation, dense: Generation, said: str) -> str:
    """One picture of a grid: tokens, seconds, and how far it is from the one with all tokens."""
    small = generation.image.copy()
    small.thumbnail((CELL, CELL))
    tokens = "" if generation.selection is None else f"{generation.selection.kept} tokens, "
    near = "" if generation is dense else f"<br>{_psnr(generation.image, dense.image)}"
    return (
        f'<img src="{data_uri(small, "JPEG")}" alt="{escape(said, True)}">'
        f"<small>{tokens}{generation.times.total:.2f} s{near}</small>"
    )


def base(dense: Generation) -> str:
    """The picture that those of a grid are compared with."""
    return f"<figure class=base><figcaption>all tokens</figcaption>{cell(dense, dense, 'all tokens')}</figure>"


def _psnr(one: Image.Image, other: Image.Image) -> str:
    error = float(np.mean((np.asarray(one, np.float32) - np.asarray(other, np.float32)) ** 2))
    return "identical to all tokens" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB to all tokens"


def links(files: Sequence[tuple[str, str, str]]) -> str:
    """Links that save files: of each what it says, the file's name, and the address that holds it."""
    return "".join(
        f'<a class="download" download="{escape(name, True)}" href="{source}">{escape(said)}</a>'
        for said, name, source in files
    )
