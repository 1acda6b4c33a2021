"""Token layouts of published any-to-any systems, to our segments and back, strictly.

- ``ADAPTERS``: name of the system -> its ``Adapter``; all can be made without arguments.
- ``Segment``: codes of one tokenizer, as ``Grammar.segment_ids`` takes and ``Grammar.segment_codes`` gives them.
"""

from __future__ import annotations

from mmtok.adapters.anygpt import AnyGPT as AnyGPT
from mmtok.adapters.base import Adapter as Adapter
from mmtok.adapters.base import Segment as Segment
from mmtok.adapters.chameleon import Chameleon as Chameleon
from mmtok.adapters.chameleon import LuminaMGPT as LuminaMGPT
from mmtok.adapters.delayed import Moshi as Moshi
from mmtok.adapters.delayed import MusicGen as MusicGen
from mmtok.adapters.emu3 import Emu3 as Emu3
from mmtok.adapters.showo import ShowO as ShowO

ADAPTERS: dict[str, type[Adapter]] = {
    adapter.name: adapter for adapter in (Chameleon, LuminaMGPT, Emu3, AnyGPT, ShowO, MusicGen, Moshi)
}
