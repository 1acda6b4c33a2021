"""HTML that cannot be broken by what it shows: every text and attribute is escaped, unless it is ``Markup`` already.

``tag``       -- an element
``table``     -- rows under a header
``embedded``  -- bytes as a data URI, so that a page needs no other file
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence

_VOID = ("br", "img", "meta")
# Control characters are not allowed in HTML; their pictures are.
_VISIBLE = {c: 0x2400 + c for c in range(32) if c not in (9, 10)} | {127: 0x2421}


class Markup(str):
    """A text that is HTML already."""

    __slots__ = ()


def escaped(value: object) -> Markup:
    """A value as HTML: markup as it is, anything else as text; control characters and lone surrogates made visible."""
    if isinstance(value, Markup):
        return value
    text = str(value).translate(_VISIBLE).encode("utf-8", "backslashreplace").decode()
    return Markup(html.escape(text))


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Several values one after another."""
    return Markup(between.join(map(escaped, parts)))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Of an attribute's name a trailing _ is dropped, others become hyphens; None leaves it out."""
    words = (
        f' {key.rstrip("_").replace("_", "-")}="{escaped(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    start = f"<{name}{''.join(words)}>"
    return Markup(start if name in _VOID else f"{start}{join(children)}</{name}>")


def table(caption: str, header: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table; of each row the first cell is a header. Numbers are set to the right, unless ``header`` is empty."""
    head = [tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in header)))] if header else []
    body = (
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_="number" if header and _is_number(cell) else None) for cell in row[1:]),
        )
        for row in rows
    )
    return tag("table", tag("caption", caption), *head, tag("tbody", *body))


def embedded(kind: str, data: bytes) -> str:
    """Bytes of a media type such as ``image/png`` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _is_number(cell: object) -> bool:
    return re.fullmatch(r"[0-9,.]+%?", str(cell)) is not None
