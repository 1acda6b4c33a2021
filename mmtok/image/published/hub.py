"""Tokenizers out of directories that transformers and diffusers wrote with ``save_pretrained``. Nothing is downloaded.

``import_transformers`` -- ``Emu3VQVAE`` and ``ChameleonVQVAE``, alone or inside the whole Emu3 or Chameleon
``import_diffusers``    -- ``VQModel``, alone or inside a pipeline
"""

from __future__ import annotations

from pathlib import Path

from mmtok.errors import CheckpointError
from mmtok.image.published.emu3 import Emu3VQ, Emu3VQConfig
from mmtok.image.published.importers import read_shape
from mmtok.image.published.vqgan import VQGAN
from mmtok.image.published.vqmodel import VQModel, VQModelConfig
from mmtok.published import config_of
from mmtok.weights import read_directory, read_json, without

_INSIDE = ("model.vqmodel.", "vqmodel.")  # where a whole Chameleon and a whole Emu3 keep their tokenizer
_FOLDERS = ("vqvae", "movq")  # where pipelines keep a VQModel
_UNIT_RANGE = "Amused"  # pipelines whose VQModel works on pixels in 0..1: their image processors do not normalise


def import_transformers(directory: str | Path) -> VQGAN | Emu3VQ:
    """Emu3's or Chameleon's tokenizer as transformers keeps it.

    Emu3's runs with transformers' own class. transformers has no decoder for Chameleon's: what it holds is converted
    to mmtok's network and can only encode; ``import_chameleon`` reads the file that has both. Pixels are -1..1 for
    both, as Emu3 and Chameleon themselves have it: the image processor of transformers multiplies by .0078 for
    Chameleon instead of 2/255, so that white is .989 there.

    Args:
        directory: with config.json and the weights, of the tokenizer or of the whole model.

    Raises:
        CheckpointError: missing or damaged, of another model, tensors that do not fit, or an image processor of Emu3
            that brings pixels to another range.
    """
    place = Path(directory)
    settings = read_json(place / "config.json")
    kind = str(settings.get("model_type"))
    whole = kind in ("chameleon", "emu3")
    if kind not in ("chameleon", "emu3", "chameleon_vqgan", "emu3_vqgan"):
        raise CheckpointError(f"{place} holds a model of type {kind!r}, expected chameleon, emu3 or their vqgan alone")
    state = read_directory(place, "model", _INSIDE if whole else ("",))
    if kind.startswith("chameleon"):
        state = without(state, "post_quant_conv.")  # it belongs to the decoder
        return VQGAN.from_weights(read_shape(state, str(place)), state, str(place))
    _check_processor(place / "preprocessor_config.json")
    config = config_of(Emu3VQConfig, settings.get("vq_config", {}) if whole else settings, place / "config.json")
    return Emu3VQ.from_weights(config, {f"model.{k}": v for k, v in state.items()}, str(place))


def import_diffusers(directory: str | Path, unit_range: bool | None = None) -> VQModel:
    """A ``VQModel`` of diffusers, run with its own class.

    Args:
        directory: with config.json and the weights, or of a pipeline that has it as ``vqvae`` or ``movq``.
        unit_range: it was trained on pixels in 0..1. None tells by the pipeline, inside which the directory lies or
            which it is: aMUSEd's are; -1..1 where there is no pipeline.

    Raises:
        CheckpointError: missing or damaged, another model, tensors that do not fit, or no diffusers installed.
    """
    place = Path(directory)
    pipeline = next((p for p in (place, place.resolve().parent) if (p / "model_index.json").is_file()), None)
    if pipeline == place:
        place = next((place / name for name in _FOLDERS if (place / name).is_dir()), place)
    settings = read_json(place / "config.json")
    if settings.get("_class_name") != "VQModel":
        raise CheckpointError(f"{place} holds a {settings.get('_class_name')!r} of diffusers, expected a 'VQModel'")
    if unit_range is None:
        name = "" if pipeline is None else str(read_json(pipeline / "model_index.json").get("_class_name"))
        unit_range = name.startswith(_UNIT_RANGE)
    config = config_of(VQModelConfig, {**settings, "unit_range": unit_range}, place / "config.json")
    state = {f"model.{k}": v for k, v in read_directory(place, "diffusion_pytorch_model").items()}
    return VQModel.from_weights(config, state, str(place))


def _check_processor(file: Path) -> None:
    """That an image processor, if there is one, brings pixels to -1..1."""
    if not file.is_file():
        return
    settings = read_json(file)
    for name in ("image_mean", "image_std"):
        if name in settings and settings[name] not in ([0.5] * 3, 0.5):
            raise CheckpointError(
                f"{file} has {name} {settings[name]}, expected [0.5, 0.5, 0.5] as Emu3 publishes it: pixels in -1..1"
            )
