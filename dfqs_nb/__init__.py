"""Support package of the DFQS workbook: one folder for each stage, each behind one door.

``core``, ``stats``   what everything stands on
``gguf``              the file: header, facts, shards, memory
``llama``             llama.cpp: check a file, open a model, generate, time it
``merge`` ``routing`` ``context`` ``scores`` ``report`` ``ladder`` ``serve``   the stages, one a notebook
``workbook``          run the notebooks; the command line
"""

__version__ = "1.0.0"
