"""``mmtok import``: a published tokenizer of images or sounds into a checkpoint of mmtok's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from mmtok.audio import published as sounds
from mmtok.errors import CheckpointError
from mmtok.image import published as images

ALL = (*images.SYSTEMS, *sounds.SYSTEMS)


def import_(
    system: Annotated[str, typer.Argument(help=f"One of: {', '.join(ALL)}.", show_default=False)],
    path: Annotated[Path, typer.Argument(help="The published file or directory, on this machine.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The checkpoint directory to write.", file_okay=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Turn a published tokenizer of images or sounds into a checkpoint that every other command takes.

    Files are read as data: no code in them runs. What each system's path is, for images:

    taming: last.ckpt of a VQGAN, beside which a last.yaml is checked if there is one

    chameleon: vqgan.ckpt, or the directory that it is in

    llamagen: vq_ds16_c2i.pt, vq_ds8_c2i.pt or vq_ds16_t2i.pt

    cosmos: the directory with encoder.jit and decoder.jit of a DI8x8 or DI16x16

    transformers: a saved Emu3VQVAE or ChameleonVQVAE, or a whole Emu3 or Chameleon

    diffusers: a saved VQModel, or a pipeline with one

    For sounds:

    dac: weights of descript-audio-codec (.pth), or a directory of transformers

    mimi: a directory of transformers

    snac: the directory with config.json and pytorch_model.bin

    xcodec: a directory of transformers

    Example: mmtok import llamagen vq_ds16_c2i.pt -o llamagen-f16
    """
    tokenizer: images.PublishedTokenizer | sounds.PublishedCodec
    if system in sounds.SYSTEMS:
        tokenizer = sounds.SYSTEMS[system].from_published(path)
    elif system in images.SYSTEMS:
        tokenizer = images.load(system, path)
    else:
        raise CheckpointError(f"no published system {system!r}; mmtok reads: {', '.join(ALL)}")
    tokenizer.save(out)
    codes, shape = tokenizer.codebook_sizes[0], dict(tokenizer.properties)
    if isinstance(tokenizer, sounds.PublishedCodec):
        shape["levels"] = len(tokenizer.codebook_sizes)
        rate, kbps = tokenizer.sample_rate, tokenizer.bandwidth()
        what = f"{shape['levels']} levels of {codes} codes, {rate / tokenizer.hop:g} frames a second of {rate} Hz, "
        what += f"{kbps:.3g} kb/s"
    else:
        what = f"{codes} codes of {tokenizer.downsample}x{tokenizer.downsample} pixels"
    report = {
        "system": system,
        "source": str(path),
        "out": str(out),
        "kind": tokenizer.kind,
        "codes": codes,
        **shape,
        "parameters": sum(p.numel() for p in tokenizer.parameters()),
        "fingerprint": tokenizer.fingerprint,
    }
    if as_json:
        print(json.dumps(report))
    else:
        print(
            f"{path} -> {out}: {tokenizer.kind}, {what}, {report['parameters']} parameters, "
            f"fingerprint {tokenizer.fingerprint[:12]}"
        )
