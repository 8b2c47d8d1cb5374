"""Say what a file is, make one sound model of shards or glued shards, and verify its bytes.

>>> from dfqs_nb.gguf.broken import reference_shards
>>> from dfqs_nb.merge import diagnose
>>> diagnose(reference_shards().paths[0]).finding
'shard 1 of 2; all 2 are here'
"""

from typing import TYPE_CHECKING

from dfqs_nb.core import lazy

if TYPE_CHECKING:
    from dfqs_nb.merge.kind import diagnose, diagnosis_table
    from dfqs_nb.merge.merge import merge_model, merge_once, open_source, repair
    from dfqs_nb.merge.verify import verify_model

__all__ = ["diagnose", "diagnosis_table", "merge_model", "merge_once", "open_source", "repair"]
__all__ += ["verify_model"]

HOMES = {"diagnose": "kind", "diagnosis_table": "kind", "verify_model": "verify"}
__getattr__ = lazy(__name__, **dict.fromkeys(__all__, "merge") | HOMES)
