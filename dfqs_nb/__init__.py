"""Support package of the DFQS workbook: one module for each stage.

Floors, ground first; a module imports only from the floors below it:

    errors, paths, machine, progress    what everything stands on
    gguf_header     the bytes of a GGUF header             header_facts   what they say of the model
    shards          find and check the shards of a model
    ggml, loader    llama.cpp's own parser and loader, asked in a child process
    diagnose        what a file really is                  compatibility  what llama.cpp requires
    holes, transfer  the engine that moves bytes           verify         hashes of tensors and files
    merge, repair   one sound file out of what there is    specimens      broken files to show
    hub, registry   names to files
    memory          what a header says a run will need
    probe, runtime  open a model safely, generate, time it
    routing         record what the router chose           routing_compare, _experiment, _verdict
    prompts, journal, states, degradation                  frozen texts, resumable runs, saved states, curves
    needles, long_context, loss, context_memory, routing_context  what grows and what fades with the context
    imatrix, quantize, divergence       which weights matter; fewer bits; how far predictions moved
    item_sets, scoring, scores, sandbox                    questions, grades, runs, and where code is run
    endpoint, servers, server_checks    any OpenAI-compatible server; local ones; their checks
    speed, comparison                                      speed against its bounds; two runs item by item
    ladder          one model at ever fewer bits, each rung measured alike
    envelope, conformance, claims       what fits where; DFQS 1.0's demands; what documents say
    report_files, report, report_text   what a report stands on; the report; as people read it
    leaderboard, report_compare         reports ranked, and side by side
    deploy          recipes to run a model with other programs
    tables, plots, ladder_plots, serve_plots               tables and figures from frames
    workbook, sweep, cli                run the notebooks, for many models; the command line
    bootstrap       the install, under any Python
"""

__version__ = "1.0.0"
