"""The ladder's child process: it quantizes or measures, as its job says."""

from dfqs_nb.core import child
from dfqs_nb.ladder import quantizer, run

if __name__ == "__main__":
    works = {"quantize": quantizer.work, "predict": run.predict, "ask": run.ask}
    child.serve(lambda job: works[job["work"]](job))
