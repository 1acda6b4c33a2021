"""Parquet files, one for each shard: what pyarrow, pandas, DuckDB, Spark and Hugging Face ``datasets`` read.

Columns: id (string), input_ids (list of uint16 or uint32), spans (list of structs: SPAN_COLUMNS, the tokenizer by its
name), meta (string, JSON). The metadata of the schema has ``mmtok.registry``, the fingerprint of the vocabulary.
The names of the files are those of the Hugging Face hub, so that ``datasets.load_dataset(OUT)`` finds them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mmtok.datasets.chunks import chunks, meta_lines
from mmtok.datasets.export.directory import Advance, export_directory, silent, sizes_of, synced
from mmtok.datasets.records import SPAN_COLUMNS, Part
from mmtok.datasets.shards import TokenDataset
from mmtok.errors import ConfigError


def export_parquet(dataset: TokenDataset, out: str | Path, advance: Advance = silent) -> dict[str, Any]:
    """Write ``out``/data/train-00000-of-00001.parquet and so on, in row groups of at most 2 ** 20 ids or one document.

    Args:
        dataset: what to export.
        out: the directory to write.
        advance: is told how many more documents are written.

    Returns:
        The contents of export.json.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: a damaged dataset, one without documents, a document of 2 ** 31 tokens or more, or a target that is
            no such export.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError as error:
        raise ConfigError("export to parquet needs pyarrow; pip install 'mmtok[export]'") from error
    span = pa.struct([(name, pa.string() if name == "tokenizer" else pa.int32()) for name in SPAN_COLUMNS])
    ids = pa.list_(pa.from_numpy_dtype(dataset.dtype))
    fields = [("id", pa.string()), ("input_ids", ids), ("spans", pa.list_(span)), ("meta", pa.string())]
    schema = pa.schema(fields, {"mmtok.registry": dataset.registry.fingerprint})
    with export_directory(dataset, out, "parquet", {"dtype": dataset.dtype.name}) as (work, about):
        (work / "data").mkdir()
        for number, shard in enumerate(dataset.shards):
            name = f"data/train-{number:05d}-of-{len(dataset.shards):05d}.parquet"
            with synced(work / name) as file, parquet.ParquetWriter(file, schema, compression="zstd") as writer:
                for _, part in chunks(shard):
                    writer.write_batch(_batch(pa, schema, dataset, part))
                    advance(len(part.documents))
    return about


def _batch(pa: Any, schema: Any, dataset: TokenDataset, part: Part) -> Any:
    """Several documents as a pyarrow RecordBatch."""
    sizes_of(part.documents[:, 0])
    names = pa.array([x.name for x in dataset.registry.tokenizers], pa.string())
    columns = [pa.array(np.ascontiguousarray(part.spans[:, i])) for i in range(len(SPAN_COLUMNS))]
    columns[SPAN_COLUMNS.index("tokenizer")] = names.take(columns[SPAN_COLUMNS.index("tokenizer")])
    lines = [line.decode() for line in meta_lines(part)]
    arrays = [
        pa.array([str(json.loads(line).get("id", "")) for line in lines], pa.string()),
        pa.ListArray.from_arrays(_offsets(part, 0), pa.array(part.tokens)),
        pa.ListArray.from_arrays(_offsets(part, 1), pa.StructArray.from_arrays(columns, list(SPAN_COLUMNS))),
        pa.array(lines, pa.string()),
    ]
    return pa.RecordBatch.from_arrays(
        [array.cast(field.type) for array, field in zip(arrays, schema, strict=True)], schema=schema
    )


def _offsets(part: Part, column: int) -> np.ndarray:
    """int32 [D + 1]: where each document's tokens (0) or spans (1) begin, and the last one's end."""
    return np.concatenate([[0], part.documents[:, column]]).astype(np.int32)
