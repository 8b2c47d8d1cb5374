"""Prepare a notebook that Colab or Kaggle opened. The set-up cell of each notebook calls `prepare`.

It runs before anything is installed, so it imports only the standard library. `install.py here` asks it what
is missing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
REFERENCE, REFERENCE_RUN = "dfqs-nano-iq1_s-xl", "nano"  # the notebooks' defaults for `model` and `run_name`
INPUTS = Path("/kaggle/input")  # read-only
PLATFORMS = (
    "COLAB_RELEASE_TAG",
    "KAGGLE_KERNEL_RUN_TYPE",
)  # the variable that tells each from other machines
AGAIN = "Then run this cell again."
NETWORK = "On Kaggle, switch the network on: Settings > Internet > On."


class Stop(Exception):
    """The notebook cannot go on; the text says why and what to do. IPython shows it without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


# --- what a hosted machine lacks ---------------------------------------------------------------------


def bounds() -> dict[str, str]:
    """The oldest version of a package that stays if it is there already, by canonical name."""
    table = _pyproject()["tool"]["dfqs"]["hosted"]["oldest"]
    return {canonical(name): version for name, version in table.items()}


def requirements() -> list[str]:
    """What the notebooks need: a lower bound where the table has one, else the pin of the lock."""
    pyproject, oldest = _pyproject(), bounds()
    pins = {canonical(re.split(r"[\[=]", pin)[0]): pin for pin in pyproject["project"]["dependencies"]}
    for name in pyproject["tool"]["dfqs"]["hosted"]["without"]:
        del pins[name]
    return [*(pins[name] for name in pins if name not in oldest), *(f"{n}>={v}" for n, v in oldest.items())]


def is_met(requirement: str) -> bool:
    """Whether this Python has what a pin or a lower bound asks for.

    >>> is_met("no-such-package==1.0")
    False
    """
    match = re.match(r"([\w.-]+)(?:\[.*\])?(==|>=)([\w.]+)", requirement)
    assert match, requirement
    name, sign, version = match.groups()
    there = installed_version(name)
    return there == version if sign == "==" else _release(there) >= _release(version)


def is_kept(name: str) -> bool:
    """Whether this Python has a package that may stay as it is; another package may still need it newer."""
    return _release(installed_version(name)) >= _release(bounds().get(name, "0"))


def installed_version(name: str) -> str:
    """The version of a package as installed now, or an empty string."""
    try:
        return importlib.metadata.version(name) or ""  # None where an install was cut off
    except importlib.metadata.PackageNotFoundError:
        return ""


def is_workbook_installed() -> bool:
    """Whether this checkout is what `import dfqs_nb` finds in every process."""
    try:
        text = importlib.metadata.distribution("dfqs-workbook").read_text("direct_url.json") or "{}"
    except importlib.metadata.PackageNotFoundError:
        return False
    return bool(json.loads(text).get("url") == REPOSITORY.as_uri())


def has_gpu() -> bool:
    """Whether the driver lists an NVIDIA GPU."""
    if not shutil.which("nvidia-smi"):
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return listing.returncode == 0 and listing.stdout.startswith("GPU ")


def has_cuda_compiler() -> bool:
    """Whether llama.cpp can be built for the GPU; a compiler beside the PATH is named to CMake."""
    usual = "/usr/local/cuda/bin/nvcc"
    if not shutil.which("nvcc") and os.access(usual, os.X_OK):
        os.environ.setdefault("CUDACXX", usual)
    return bool(shutil.which("nvcc") or os.environ.get("CUDACXX"))


def canonical(name: str) -> str:
    """A package's name as the lock spells it.

    >>> canonical("huggingface_hub")
    'huggingface-hub'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


# --- the set-up cell ---------------------------------------------------------------------------------


def prepare(namespace: dict[str, Any]) -> None:
    """Make a notebook work alone: its packages, its outputs folder, its model.

    Args:
        namespace: of the notebook, after its parameters. Those with their defaults may change: for the
            variable ``DFQS_MODEL`` the model, the run and the settings of its tier, on Kaggle
            ``output_dir``. For a model in Kaggle's inputs ``consume`` is switched off.

    Raises:
        Stop: the install or notebook 01 fails, or the kernel restarts.
    """
    os.environ.setdefault("DFQS_OUTPUTS", os.path.abspath("outputs"))  # noqa: PTH100
    before = versions()
    run([str(REPOSITORY / "tools" / "install.py"), "here"], f"The install failed. {NETWORK} {AGAIN}")
    importlib.invalidate_caches()
    if replaced := replaced_while_loaded(before, versions()):
        restart(replaced)
    sys.path.insert(0, str(REPOSITORY))
    check_gpu(namespace)
    model = use_own_model(namespace)
    if "consume" in namespace:  # notebook 01
        use_kaggle_disks(namespace)
    elif namespace.keys() & notebook_defaults().keys() - {"run_name"}:  # notebook 00 opens no model
        make_merge(str(namespace["run_name"]), model)


def run(arguments: list[str], failure: str, quiet: bool = False) -> None:
    """Run a Python program and show what it prints; if `quiet`, only when it fails.

    Raises:
        Stop: it fails; the text is `failure`.
    """
    environment = {name: value for name, value in os.environ.items() if name not in PLATFORMS}
    command, lines = [sys.executable, "-u", *arguments], []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        try:
            for line in process.stdout or ():
                lines.append(line)
                if not quiet:
                    print(line, end="", flush=True)
        finally:
            process.terminate()
    if process.returncode:
        print("".join(lines) if quiet else "", end="", flush=True)
        raise Stop(failure)


def versions() -> dict[str, str]:
    """Every installed package with its version."""
    installed = reversed(list(importlib.metadata.distributions()))  # what comes first on the path counts
    return {distribution.metadata["Name"]: distribution.version for distribution in installed}


def replaced_while_loaded(before: dict[str, str], after: dict[str, str]) -> dict[str, str]:
    """The packages that changed and that this process has imported, each with its version now."""
    changed = {name: after.get(name, "") for name in before if after.get(name) != before[name]}
    if not changed:
        return {}
    owners = importlib.metadata.packages_distributions()
    loaded = {name for module in sys.modules if "." not in module for name in owners.get(module, ())}
    return {name: version for name, version in changed.items() if name in loaded}


def restart(replaced: dict[str, str]) -> None:
    """Restart the kernel, which still has old versions in memory.

    Raises:
        Stop: always, so that no later cell runs with them.
    """
    names = ", ".join(f"{name} {version}" for name, version in replaced.items())
    kernel = getattr(sys.modules["IPython"].get_ipython(), "kernel", None)
    if kernel is None or os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch":
        raise Stop(f"Installed {names}, but this process has older versions in memory. Start it again.")
    print(f"Installed {names}. The notebook had older versions in memory, so its kernel restarts now.")
    kernel.do_shutdown(True)
    raise Stop("The kernel restarts. Run all cells again: what was installed stays.")


def check_gpu(namespace: dict[str, Any]) -> None:
    """Say so where there is a GPU that this llama.cpp cannot use: the notebooks put all layers on one."""
    code = "import llama_cpp; raise SystemExit(not llama_cpp.llama_supports_gpu_offload())"
    if namespace.get("n_gpu_layers") and has_gpu():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
        if done.returncode:
            print("There is a GPU, but this llama.cpp is built for the processor only.")


def use_own_model(namespace: dict[str, Any]) -> str:
    """The model that `DFQS_MODEL` names, or an empty string. It gets a run of its own."""
    model = os.environ.get("DFQS_MODEL", "")
    if not model or namespace.get("model", REFERENCE) != REFERENCE:
        return ""
    if "model" in namespace:
        namespace["model"] = model
    if namespace["run_name"] == REFERENCE_RUN:
        from dfqs_nb.workbook.run import default_run_name

        namespace["run_name"] = default_run_name(model)
    print(f"DFQS_MODEL: {model}, in the run {namespace['run_name']}")
    use_tier(namespace, model)
    return model


def use_tier(namespace: dict[str, Any], model: str) -> None:
    """Give parameters that have their defaults the values of the model's tier, as `make run` does."""
    from dfqs_nb.workbook.run import settings_of, tier_of

    defaults = notebook_defaults()
    settings = {
        name: value
        for name, value in settings_of(tier_of(model)).items()
        if name in namespace and namespace[name] in defaults[name]
    }
    namespace.update(settings)
    if settings:
        print("Changed for it:", ", ".join(f"{name} = {value!r}" for name, value in settings.items()))


def notebook_defaults() -> dict[str, list[Any]]:
    """The values that the notebooks give to each parameter."""
    defaults: dict[str, list[Any]] = {}
    for path in sorted((REPOSITORY / "notebooks").glob("[0-9]*.ipynb")):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if "parameters" in cell["metadata"].get("tags", []):
                values: dict[str, Any] = {}
                exec("".join(cell["source"]), {}, values)
                for name, value in values.items():
                    if not name.startswith("_"):  # the types of the others
                        defaults.setdefault(name, []).append(value)
    return defaults


def use_kaggle_disks(namespace: dict[str, Any]) -> None:
    """Never consume a read-only input, and merge a model of one's own beside Kaggle's 20 GB of outputs."""
    model = namespace.get("model", REFERENCE)
    if namespace["consume"] and Path(model).absolute().is_relative_to(INPUTS):
        namespace["consume"] = False
        print(f"consume = False: {INPUTS} is read-only.")
    if not namespace["output_dir"] and (folder := scratch(model)):
        namespace["output_dir"] = folder
        print(f"output_dir = {folder!r}: /kaggle/working holds 20 GB only.")


def scratch(model: str) -> str:
    """A folder where Kaggle has room for a merged model; "" elsewhere, and for the reference model."""
    if "KAGGLE_KERNEL_RUN_TYPE" not in os.environ or model in ("", REFERENCE):
        return ""
    folder = Path(tempfile.gettempdir(), "dfqs-models")
    folder.mkdir(exist_ok=True)
    return str(folder)


def make_merge(run_name: str, model: str) -> None:
    """Run notebook 01, unless this run has its stage, for this model, and the file is still there.

    Raises:
        Stop: the model cannot be had, or the notebook fails.
    """
    if is_merged(Path(os.environ["DFQS_OUTPUTS"], run_name, "merge.json"), model):
        return
    from dfqs_nb.core.errors import DfqsError
    from dfqs_nb.gguf.models import resolve

    try:
        resolve(model or REFERENCE)  # here, because a download shows its progress here
    except DfqsError as error:
        raise Stop(str(error)) from None
    print("Notebook 01 prepares the model (the reference model takes seconds) ...", flush=True)
    arguments = ["-m", "dfqs_nb", "run", "01", "--run", run_name]
    arguments += ["--model", model] if model else []
    arguments += ["-p", f"output_dir={scratch(model)}"] if scratch(model) else []
    run(arguments, "Notebook 01 could not prepare the model; the reason is above.", quiet=True)


def is_merged(stage: Path, model: str = "") -> bool:
    """Whether notebook 01 left its stage file for this model, and the file that it hands on is where it was.

    Without a ``model`` any will do. Runs of two models can have the same name, which comes from the file's.
    """
    try:
        content = json.loads(stage.read_text(encoding="utf-8"))
        if model and content["conditions"]["model"] not in (model, str(Path(model).absolute())):
            return False
        return Path(content["model"]["path"]).is_file()
    except (OSError, ValueError, LookupError, TypeError):
        return False
