"""Bringing other people's files in and taking ours out.

:func:`import_file` recognises what a file is, imports every row it can, and keeps the others in a
reject file with line number and reason; it resumes when it was killed, and importing again stores
nothing twice. :func:`export_file` writes any format and says what the format could not hold.

    report = import_file(store, "harmless-base_test.jsonl.gz")
    report = export_file(store, "pairs.jsonl", format="trl", kind="comparison")

One file per format, each a few small functions under :func:`importer` and :func:`exporter`:

- ``lines.py`` and ``readers.py`` turn a path into numbered rows, whatever is in it;
- ``shapes.py`` says what a row with certain keys means, so that CSV, Parquet, JSON lines and Hugging
  Face datasets all understand the same rows;
- ``importing.py``, ``rejects.py`` and ``exporting.py`` are the engines;
- the rest are formats.
"""

# Importing a format's module registers it; the order is the order in which they are tried.
from corrigible.store.formats import (  # isort: skip
    corrigible_jsonl,
    ukp_convarg1,
    humour_pairs,
    argilla,
    label_studio,
    hh_rlhf,
    openai_chat,
    trl,
    tables,
)
from corrigible.store.formats.exporting import ExportReport, export_file
from corrigible.store.formats.importing import ImportReport, import_file, sniff
from corrigible.store.formats.registry import EXPORTERS, IMPORTERS, exporter, importer

__all__ = [
    "EXPORTERS",
    "IMPORTERS",
    "ExportReport",
    "ImportReport",
    "argilla",
    "corrigible_jsonl",
    "export_file",
    "exporter",
    "hh_rlhf",
    "humour_pairs",
    "import_file",
    "importer",
    "label_studio",
    "openai_chat",
    "sniff",
    "tables",
    "trl",
    "ukp_convarg1",
]
