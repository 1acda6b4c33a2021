"""``mmtok import``: a published tokenizer of images, sounds or text into a checkpoint of mmtok's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmtok.audio import published as sounds
from mmtok.errors import CheckpointError
from mmtok.image import published as images
from mmtok.text import published as texts

ALL = (*images.SYSTEMS, *sounds.SYSTEMS, *texts.SYSTEMS)


def import_(
    system: Annotated[str, typer.Argument(help=f"One of: {', '.join(ALL)}.", show_default=False)],
    path: Annotated[Path, typer.Argument(help="The published file or directory, on this machine.", show_default=False)],
    out: Annotated[Path, typer.Option("-o", "--out", help="The checkpoint directory to write.", file_okay=False)],
    pattern: Annotated[
        str | None,
        typer.Option(help=f"How tiktoken splits text: {', '.join(texts.ENCODINGS)}, or a regular expression."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Turn a published tokenizer of images, sounds or text into a checkpoint that every other command takes.

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

    For text, whose ids are compared with the original library's:

    tokenizers: the tokenizer.json of a byte-level BPE (GPT-2, GPT-NeoX, Llama 3, Qwen), or the directory that it is in

    tiktoken: a .tiktoken file; --pattern says how it splits text, unless it is named like cl100k_base.tiktoken

    sentencepiece: the tokenizer.model of a BPE or Unigram model with byte fallback (Llama 2, Mistral, Gemma)

    Example: mmtok import llamagen vq_ds16_c2i.pt -o llamagen-f16
    """
    if pattern is not None and system != "tiktoken":
        raise CheckpointError(f"--pattern says how a .tiktoken file splits text, got it for {system!r}; leave it out")
    source = {"system": system, "source": str(path), "out": str(out)}
    if system in texts.SYSTEMS:
        report, what = _text(system, path, out, {"pattern": pattern} if pattern else {})
    elif system in ALL:
        report, what = _codec(system, path, out)
    else:
        raise CheckpointError(f"no published system {system!r}; mmtok reads: {', '.join(ALL)}")
    if as_json:
        print(json.dumps({**source, **report}))
    else:
        print(f"{path} -> {out}: {report['kind']}, {what}, fingerprint {report['fingerprint'][:12]}")
        for note in report.get("notes", ()):
            print(f"note: {note}")


def _codec(system: str, path: Path, out: Path) -> tuple[dict[str, Any], str]:
    """Import a tokenizer of images or sounds; what there is to report, and the same in words."""
    tokenizer: images.PublishedTokenizer | sounds.PublishedCodec
    tokenizer = sounds.SYSTEMS[system].from_published(path) if system in sounds.SYSTEMS else images.load(system, path)
    tokenizer.save(out)
    codes, shape = tokenizer.codebook_sizes[0], dict(tokenizer.properties)
    if isinstance(tokenizer, sounds.PublishedCodec):
        shape["levels"] = len(tokenizer.codebook_sizes)
        rate, kbps = tokenizer.sample_rate, tokenizer.bandwidth()
        what = f"{shape['levels']} levels of {codes} codes, {rate / tokenizer.hop:g} frames a second of {rate} Hz, "
        what += f"{kbps:.3g} kb/s"
    else:
        what = f"{codes} codes of {tokenizer.downsample}x{tokenizer.downsample} pixels"
    parameters = sum(p.numel() for p in tokenizer.parameters())
    report = {"kind": tokenizer.kind, "codes": codes, **shape, "parameters": parameters}
    return {**report, "fingerprint": tokenizer.fingerprint}, f"{what}, {parameters} parameters"


def _text(system: str, path: Path, out: Path, options: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Import a text tokenizer; what there is to report, and the same in words."""
    imported = texts.SYSTEMS[system](path, **options)
    tokenizer, library, compared = imported.tokenizer, imported.library, imported.compared
    tokenizer.save(out)
    codes = tokenizer.codebook_sizes[0]
    report = {"kind": tokenizer.kind, "codes": codes, "library": library, "compared": compared}
    if compared is None:
        proof = f"not compared with {library}, which is not installed"
    else:
        proof = f"those of {library} on all {compared} texts compared"
    return {**report, "notes": imported.notes, "fingerprint": tokenizer.fingerprint}, f"{codes} ids, {proof}"
