"""Token datasets in the formats of other trainers: ``megatron``, ``flat``, ``parquet`` and ``webdataset``.

Each module has one function that writes a directory: the documents, vocab.json, and export.json, which names the
format, the counts and the fingerprint of the vocabulary. The directory appears complete or not at all, memory does not
grow with the dataset, sums are compared while it is read, and the same dataset gives the same bytes.
"""
