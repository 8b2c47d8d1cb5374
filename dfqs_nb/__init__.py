"""Support package of the DFQS workbook: one module for each stage.

Floors, ground first; a module imports only from the floors below it:

    errors, paths
    gguf_header     the bytes of a GGUF header
    shards          find, check, merge, verify       memory    what a run will need
    ggml            llama.cpp's own GGUF parser      registry  names to files
    runtime         open a model safely, generate, time it
    plots           figures from frames
    workbook, cli   run the notebooks; the command line
"""

__version__ = "1.0.0"
