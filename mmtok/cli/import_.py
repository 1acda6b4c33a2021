"""``mmtok import``: a published image tokenizer into a checkpoint of mmtok's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmtok.image import published


def import_(
    system: Annotated[str, typer.Argument(help=f"One of: {', '.join(published.SYSTEMS)}.", show_default=False)],
    path: Annotated[Path, typer.Argument(help="The published file or directory, on this machine.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The checkpoint directory to write.", file_okay=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Turn a published image tokenizer into a checkpoint that every other command takes.

    Files are read as data: no code in them runs. What each system's path is:

    taming: last.ckpt of a VQGAN, beside which a last.yaml is checked if there is one

    chameleon: vqgan.ckpt, or the directory that it is in

    llamagen: vq_ds16_c2i.pt, vq_ds8_c2i.pt or vq_ds16_t2i.pt

    cosmos: the directory with encoder.jit and decoder.jit of a DI8x8 or DI16x16

    transformers: a saved Emu3VQVAE or ChameleonVQVAE, or a whole Emu3 or Chameleon

    diffusers: a saved VQModel, or a pipeline with one

    Example: mmtok import llamagen vq_ds16_c2i.pt -o llamagen-f16
    """
    tokenizer = published.load(system, path)
    tokenizer.save(out)
    report = {
        "system": system,
        "source": str(path),
        "out": str(out),
        "kind": tokenizer.kind,
        "codes": tokenizer.codebook_sizes[0],
        "downsample": tokenizer.downsample,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "fingerprint": tokenizer.fingerprint,
    }
    if as_json:
        print(json.dumps(report))
    else:
        side = tokenizer.downsample
        print(
            f"{path} -> {out}: {tokenizer.kind}, {report['codes']} codes of {side}x{side} pixels, "
            f"{report['parameters']} parameters, fingerprint {tokenizer.fingerprint[:12]}"
        )
