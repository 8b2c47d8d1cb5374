"""The ladder's child process: it quantizes, measures or times, as its job says."""

from dfqs_nb.core import child
from dfqs_nb.ladder import measure, quantizer

if __name__ == "__main__":
    works = {"quantize": quantizer.work, "measure": measure.work, "time": measure.time_decode}
    child.serve(lambda job: works[job["work"]](job))
