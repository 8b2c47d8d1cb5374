"""Say what a file is, make one sound model of shards, byte parts or glued shards, and verify its bytes.

>>> from dfqs_nb.gguf.broken import reference_shards
>>> diagnose(reference_shards().paths[0]).finding
'shard 1 of 2; all 2 are here'
"""

from typing import TYPE_CHECKING

from dfqs_nb.core.doors import lazy
from dfqs_nb.merge.kind import diagnose, diagnosis_table
from dfqs_nb.merge.merge import merge_model, merge_once, methods_table, open_source, repair
from dfqs_nb.merge.verify import compare_tensors, verify_model

if TYPE_CHECKING:
    from dfqs_nb.merge import figures

__all__ = [
    "compare_tensors",
    "diagnose",
    "diagnosis_table",
    "figures",
    "merge_model",
    "merge_once",
    "methods_table",
    "open_source",
    "repair",
    "verify_model",
]

__getattr__ = lazy(__name__, figures="figures")
