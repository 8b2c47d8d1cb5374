"""Say what a file is, make one sound model of shards or glued shards, and verify its bytes.

>>> from dfqs_nb.gguf.broken import reference_shards
>>> diagnose(reference_shards().paths[0]).finding
'shard 1 of 2; all 2 are here'
"""

from dfqs_nb.merge.kind import diagnose, diagnosis_table
from dfqs_nb.merge.merge import merge_model, merge_once, open_source, repair
from dfqs_nb.merge.verify import verify_model

__all__ = [
    "diagnose",
    "diagnosis_table",
    "merge_model",
    "merge_once",
    "open_source",
    "repair",
    "verify_model",
]
