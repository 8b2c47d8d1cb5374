"""Support package of the DFQS workbook: one module for each stage.

Floors, ground first; a module imports only from the floors below it:

    errors, paths, machine, progress    what everything stands on
    gguf_header     the bytes of a GGUF header             header_facts   what they say of the model
    shards          find and check the shards of a model
    ggml, loader    llama.cpp's own parser and loader, asked in a child process
    diagnose        what a file really is                  compatibility  what llama.cpp requires
    holes, transfer the engine that moves bytes            verify         hashes of tensors and files
    merge, repair   one sound file out of what there is    specimens      broken files to show
    hub, registry   names to files
    memory          what a header says a run will need
    probe, runtime  open a model safely, generate, time it
    tables, plots   tables and figures from frames
    workbook, cli   run the notebooks; the command line    bootstrap      the install, under any Python
"""

__version__ = "1.0.0"
