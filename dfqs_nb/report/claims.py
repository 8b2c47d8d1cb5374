"""The statements of the two seed documents, each held against a fact or a measurement.

The statements are data: ``data/spec/claims.toml`` has our paraphrase, the figure with its unit, the check and
its arguments, and where the fact was published. All of them are about one artifact, the file
DeepSeek-V4-Flash-IQ1_S-XL, so they are judged about it alone. Where the model of a run is that artifact, its
own header and measurements are the evidence; where it is another one (the reference model, say) the evidence
is what was published of the artifact, and what only a run of it could show is "not testable here".
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Literal

from dfqs_nb.context.cost import PublishedShape, published_shape
from dfqs_nb.core.errors import DfqsError
from dfqs_nb.gguf.facts import bits_per_weight, layer_of, parameters, types_by_bytes
from dfqs_nb.gguf.header import TENSOR_TYPES, GGUFHeader
from dfqs_nb.gguf.memory import CACHE_TYPES, kv_cache_bytes, weights_bytes
from dfqs_nb.gguf.models import registered
from dfqs_nb.gguf.reading import FLASH, ActiveBytes, active_bytes
from dfqs_nb.report.envelope import GB, read_spec
from dfqs_nb.scores import speed as scores_speed

if TYPE_CHECKING:
    import pandas as pd

CONFIRMED, CONTRADICTED, CONTRADICTS_ITSELF = "confirmed", "contradicted", "contradicts itself"
NOT_TESTABLE, NOT_CHECKABLE = "not testable here", "not checkable"
VERDICTS = (CONFIRMED, CONTRADICTED, CONTRADICTS_ITSELF, NOT_TESTABLE, NOT_CHECKABLE)
COLUMNS = ("id", "document", "claim", "how", "found", "verdict", "evidence", "source")
SHARDS = "deepseek-v4-flash-iq1_s-xl"  # in data/models.toml, as is the next
SINGLE = "deepseek-v4-flash-iq1_s-xl-single"
QUANTIZATION = "IQ1_S"  # of most bytes of the artifact
SIZE_MARGIN = 0.03  # within this share of its size, a file of its shapes and types is taken for the artifact
GIB = 2**30


@dataclass(frozen=True)
class Claim:
    """One statement: see ``data/spec/claims.toml``. ``tolerance`` is a share of the figure."""

    id: str
    document: str
    text: str
    check: str
    source: str
    value: Any = None
    unit: str = ""
    tolerance: float | None = None
    args: Mapping[str, Any] = field(default_factory=dict)

    def agrees(self, found: float) -> bool:
        """Whether a number agrees with the figure: within its tolerance, or one unit of its last digit.

        >>> [Claim("x", "card", "", "", "", value=61.6).agrees(found) for found in (61.54, 61.4)]
        [True, False]
        """
        if self.tolerance is not None:
            return abs(found - self.value) <= self.tolerance * self.value
        return abs(found - self.value) < 10.0 ** Decimal(str(self.value)).as_tuple().exponent

    @property
    def figure(self) -> str:
        """The figure with its unit."""
        return _figure(self.value, self.unit)


def _figure(value: Any, unit: str = "") -> str:
    """A figure as people read it.

    >>> _figure(1048576, "tokens"), _figure([0.2, 0.5], "tokens/s"), _figure(68, "%")
    ('1,048,576 tokens', '0.2 to 0.5 tokens/s', '68 %')
    """
    if isinstance(value, list):
        text = f"{value[0]:,} to {value[-1]:,}"
    else:
        text = f"{value:,}" if isinstance(value, int | float) else str(value)
    return f"{text} {unit}".strip()


@dataclass(frozen=True)
class Finding:
    """What a check found: the fact in short, the verdict, and one sentence of evidence."""

    found: str
    verdict: str
    evidence: str


@dataclass(frozen=True)
class Evidence:
    """What checks may look at: what is known of the artifact, and what a run measured.

    Attributes:
        header: of the model that was run.
        stages: what the notebooks handed on, by stage.
        published: the table ``published`` of ``claims.toml``.
        claims: all statements by id, for figures that are held against one another.
        ask_llama_cpp: whether llama.cpp may be asked what it makes of a raw concatenation.
    """

    header: GGUFHeader | None
    stages: Mapping[str, Mapping[str, Any]]
    published: Mapping[str, Any]
    claims: Mapping[str, Claim]
    ask_llama_cpp: bool = True

    @cached_property
    def match(self) -> Match:
        """How the model that was run is related to the artifact."""
        return artifact_match(self.header, self.stages)

    @property
    def own(self) -> GGUFHeader | None:
        """The header that was read, where it is the header of DeepSeek-V4-Flash."""
        return self.header if self.match.level != "another" else None

    @property
    def file(self) -> GGUFHeader | None:
        """The header that was read, where it is the artifact's, in its quantization."""
        return self.header if self.match.level == "artifact" else None

    @property
    def shape(self) -> GGUFHeader | PublishedShape:
        """What the formulas of `memory` read: the file's own header, or the published shape."""
        return self.own or published_shape()

    @property
    def basis(self) -> str:
        """Where a fact about the model comes from, as it stands in a sentence."""
        return {
            "artifact": "the file's own header",
            "another": "the published configuration",
            "model": "the header of the same model in another quantization",
        }[self.match.level]

    def key(self, name: str) -> Any:
        """A key of the architecture, from the header or as it was published; None where neither has it."""
        return self.own.arch(name) if self.own is not None else self.published.get(name)

    @property
    def nbytes(self) -> int:
        """Size of the published single file in bytes."""
        return registered()[SINGLE].size_bytes

    @property
    def weights(self) -> int:
        """Bytes of the artifact's weights: of its tensors, or at most the whole published file."""
        return weights_bytes(self.file) if self.file is not None else FLASH.weights

    @property
    def active(self) -> ActiveBytes:
        """Bytes that a token reads."""
        return active_bytes(self.file) if self.file is not None else FLASH

    @property
    def subject(self) -> str:
        """Whose measurements a run has, when they are not the artifact's."""
        if not self.stages:
            return "the artifact was not run"
        return f"this run measured {self.match.name}, not the artifact"


@dataclass(frozen=True)
class Match:
    """How a model is related to the artifact.

    Attributes:
        level: ``artifact`` (this file, merged or not), ``model`` (DeepSeek-V4-Flash in another quantization)
            or ``another``.
        name: of the model that was run.
        reason: what that rests on.
    """

    level: Literal["artifact", "model", "another"]
    name: str
    reason: str


def artifact_match(header: GGUFHeader | None, stages: Mapping[str, Mapping[str, Any]]) -> Match:
    """Whether the model of a run is the artifact: by SHA-256, or by architecture, types and size.

    No quantity that a statement is about decides it, so that a header can contradict a statement.
    """
    model = stages.get("merge", {}).get("model", {})
    if header is None:
        return Match("another", model.get("name", "no model"), "no header was given")
    name = model.get("name") or header.get("general.name", header.path.stem)
    known = {one.sha256 for key in (SHARDS, SINGLE) for one in registered()[key].files}
    known |= {registered()[key].merged_sha256 for key in (SHARDS, SINGLE)} - {""}
    if header.get("split.count", 0) > 1:
        return Match("another", name, "its header lists the tensors of one shard")
    shape = published_shape()
    differs = [key for key, value in shape.keys.items() if _of_header(header, key, value) != value]
    if header.architecture != shape.architecture or differs:
        why = differs[0] if header.architecture == shape.architecture else f"it is {header.architecture}"
        return Match("another", name, f"not the shape of {shape.name} ({why})")
    if model.get("sha256") in known:
        return Match("artifact", name, "SHA-256 of the file")
    most = next(iter(types_by_bytes(header.tensors)), "no tensors")
    size = registered()[SINGLE].size_bytes
    if most == QUANTIZATION and abs(header.file_size - size) <= SIZE_MARGIN * size:
        return Match("artifact", name, f"shape, types and size ({header.file_size:,} bytes)")
    return Match("model", name, f"shape of {shape.name}; {most}, {header.file_size:,} bytes")


def _of_header(header: GGUFHeader, key: str, like: Any) -> Any:
    """A key as the published shape writes it: a list as long (a next-token layer may follow in the file)."""
    value = header.arch(key)
    return value[: len(like)] if isinstance(like, list) and isinstance(value, list) else value


Check = Callable[[Claim, Evidence], Finding]
CHECKS: dict[str, Check] = {}


def check(function: Check) -> Check:
    """Register a check under its function's name; the first line of its docstring says how it checks."""
    CHECKS[function.__name__] = function
    return function


def load_claims() -> list[Claim]:
    """The statements of ``data/spec/claims.toml``, in its order.

    Raises:
        RegistryError: the table cannot be read.
        DfqsError: an entry has an unknown field.
    """
    try:
        return [Claim(**entry) for entry in read_spec("claims")["claims"]]
    except TypeError as error:
        raise DfqsError(
            f"an entry cannot be read ({error})",
            where="data/spec/claims.toml",
            hint="its fields are those of claims.Claim",
        ) from error


def check_claims(
    stages: Mapping[str, Mapping[str, Any]],
    header: GGUFHeader | None = None,
    *,
    claims: Sequence[Claim] | None = None,
    ask_llama_cpp: bool = True,
) -> pd.DataFrame:
    """Check every statement about the artifact with what this run and the public record have.

    Args:
        stages: what each notebook handed on, by stage (``merge``, ``routing``, ``long_context``, ``scores``);
            an empty mapping checks against the public record alone.
        header: of the model that was run.
        claims: other statements than those of ``data/spec/claims.toml``.
        ask_llama_cpp: have llama.cpp (in a child process) say what it makes of two shards put end to end.

    Returns:
        One row a statement: the columns `COLUMNS`. ``found`` is the fact in short, ``verdict`` one of
        `VERDICTS`, ``evidence`` one sentence, ``source`` where the fact was published.

    Raises:
        DfqsError: a statement names a check that does not exist.
    """
    import pandas as pd

    listed, spec = list(claims if claims is not None else load_claims()), read_spec("claims")
    evidence = Evidence(header, stages, spec["published"], {one.id: one for one in listed}, ask_llama_cpp)
    rows = []
    for one in listed:
        if one.check not in CHECKS:
            raise DfqsError(
                f"no check is called {one.check!r}",
                where="data/spec/claims.toml",
                hint=f"use one of {', '.join(CHECKS)}",
            )
        found = _find(one, evidence)
        how = (CHECKS[one.check].__doc__ or "").splitlines()[0].rstrip(".")
        said = (one.id, one.document, one.text)
        rows.append((*said, how, found.found, found.verdict, found.evidence, one.source))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _find(claim: Claim, at: Evidence) -> Finding:
    """A check's finding; a stage that lacks what it should have is no evidence."""
    try:
        return CHECKS[claim.check](claim, at)
    except (KeyError, TypeError, AttributeError) as error:
        if not at.stages:
            raise
        return Finding("not measured", NOT_TESTABLE, f"what a stage recorded lacks {error}")


def documents() -> dict[str, str]:
    """The documents by the short name that the table uses, with where they were published.

    >>> list(documents())
    ['card', 'DFQS 1.0', 'DFQS paper', 'shards page']
    """
    return dict(read_spec("claims")["documents"])


def counts(table: pd.DataFrame) -> str:
    """How many statements got each verdict, in one sentence.

    >>> import pandas as pd
    >>> counts(pd.DataFrame({"verdict": ["confirmed", "contradicted", "confirmed"]}))
    '3 statements: 2 confirmed, 1 contradicted'
    """
    found = table["verdict"].value_counts()
    parts = ", ".join(f"{found[word]} {word}" for word in VERDICTS if word in found)
    return f"{len(table)} statements: {parts}"


def _judged(agrees: bool) -> str:
    return CONFIRMED if agrees else CONTRADICTED


def _gb(nbytes: float) -> str:
    return f"{nbytes / GB:,.2f} GB"


def _both(nbytes: float) -> str:
    """Bytes in both units that people mix up.

    >>> _both(61_540_805_344)
    '61.54 GB (57.31 GiB)'
    """
    return f"{_gb(nbytes)} ({nbytes / GIB:,.2f} GiB)"


# ---- sizes and ratios ----


@check
def file_size(claim: Claim, at: Evidence) -> Finding:
    """The published size in bytes, as GB (10^9) and as GiB (2^30), and the figure of the other document."""
    found = f"{at.nbytes:,} bytes = {at.nbytes / GB:.2f} GB = {at.nbytes / GIB:.2f} GiB"
    other = at.claims.get(claim.args.get("against", ""))
    if claim.agrees(at.nbytes / GB):
        return Finding(
            found, CONFIRMED, f"{claim.figure} is the size in GB within one unit of its last digit"
        )
    in_gib = claim.agrees(at.nbytes / GIB)
    unit = "it is the size in GiB, written as GB" if in_gib else "it is the size in neither GB nor GiB"
    if other is None or other.unit != claim.unit or other.value == claim.value:
        return Finding(found, CONTRADICTED, f"{claim.figure}: {unit}")
    return Finding(
        found,
        CONTRADICTS_ITSELF if in_gib else CONTRADICTED,
        f"{claim.figure} here and {other.figure} in {other.document} for one file: {unit}",
    )


@check
def weights(claim: Claim, at: Evidence) -> Finding:
    """Bytes of all tensors, and of the routed experts alone."""
    experts = at.active.routed_total
    verdict = _judged(claim.agrees(at.weights / GB))
    part = "; the figure is that of the routed experts alone" if claim.agrees(experts / GB) else ""
    return Finding(
        _gb(at.weights),
        verdict,
        f"all weights take {_both(at.weights)}, the routed experts {_both(experts)}{part}",
    )


@check
def original_size(claim: Claim, at: Evidence) -> Finding:
    """The size of the checkpoint as its maker published it."""
    native = at.published["native_bytes"]
    verdict = _judged(claim.agrees(native / GB))
    bits = 8 * native / at.published["parameters"]
    return Finding(
        _gb(native),
        verdict,
        f"the published checkpoint, in FP4 and FP8, takes {_both(native)}, {bits:.2f} bits a parameter",
    )


@check
def compression(claim: Claim, at: Evidence) -> Finding:
    """The published checkpoint's size divided by the file's."""
    ratio = at.published["native_bytes"] / at.nbytes
    own = claim.args["original_gb"] / claim.args["size_gb"]
    return Finding(
        f"{ratio:.2f}",
        _judged(claim.agrees(ratio)),
        f"{_gb(at.published['native_bytes'])} / {_gb(at.nbytes)} = {ratio:.2f}; the document's own figures "
        f"give {claim.args['original_gb']} / {claim.args['size_gb']} = {own:.2f}",
    )


@check
def reduction(claim: Claim, at: Evidence) -> Finding:
    """The share of the published checkpoint's size that the file saves."""
    saved = 100 * (1 - at.nbytes / at.published["native_bytes"])
    own = 100 * (1 - claim.args["size_gb"] / claim.args["original_gb"])
    return Finding(
        f"{saved:.1f} %",
        _judged(claim.agrees(saved)),
        f"{_gb(at.nbytes)} of {_gb(at.published['native_bytes'])}: {saved:.1f} % less; the document's own "
        f"figures give {own:.1f} %",
    )


@check
def count_parameters(claim: Claim, at: Evidence) -> Finding:
    """Weights counted from the shapes of all tensors; of routed experts, those that a token uses."""
    total, active, _ = _parameters(at)
    number = {"total": total, "active": active}[claim.args["which"]]
    return Finding(
        f"{number / 1e9:,.2f} billion",
        _judged(claim.agrees(number / 1e9)),
        f"{number:,}, counted from the shapes in {at.basis}",
    )


def _parameters(at: Evidence) -> tuple[int, int, int]:
    """All weights, those active for a token, and those of routed experts."""
    if at.own is not None:
        count = parameters(at.own)
        return count.total, count.active, count.routed
    return tuple(at.published[key] for key in ("parameters", "active_parameters", "routed_parameters"))


# ---- the model's shape ----


@check
def header_key(claim: Claim, at: Evidence) -> Finding:
    """The key of the header, or the same quantity in the published configuration."""
    value = at.key(claim.args["key"])
    if value is None:
        return Finding("not stated", NOT_TESTABLE, f"{at.basis} does not state {claim.args['key']}")
    return Finding(
        _figure(value, claim.unit),
        _judged(value == claim.value),
        f"{claim.args['key']} is {value:,} in {at.basis}",
    )


@check
def experts_used(claim: Claim, at: Evidence) -> Finding:
    """Experts a token in the header or the configuration, and the active parameters that follow."""
    used, number = at.key("expert_used_count"), at.key("expert_count")
    if not used or not number:
        return Finding("not stated", NOT_TESTABLE, f"{at.basis} does not state the experts a token")
    _, active, routed = _parameters(at)
    other = active + routed * (claim.value - used) / number
    verdict = _judged(used == claim.value)
    aside = "" if used == claim.value else f"; with {claim.value} it would be {other / 1e9:.2f} billion"
    return Finding(
        _figure(used, claim.unit),
        verdict,
        f"expert_used_count is {used} of {number} in {at.basis}, which gives {active / 1e9:.2f} billion "
        f"active parameters{aside}",
    )


@check
def tensor_type(claim: Claim, at: Evidence) -> Finding:
    """The type of most bytes in the tensor table, and the mean bits a weight."""
    own_bits = _block_bits(claim.value)
    if at.file is None:
        mean = 8 * at.nbytes / at.published["parameters"]
        return Finding(
            f"{mean:.2f} bits a weight",
            NOT_TESTABLE,
            f"the published size and parameter count give {mean:.2f} bits a weight on average, above the "
            f"{own_bits} of {claim.value} itself, so other types are mixed in; which, the file's tensor "
            "table says",
        )
    sizes = types_by_bytes(at.file.tensors)
    most, whole = next(iter(sizes)), sum(sizes.values())
    shares = ", ".join(f"{name} {size / whole:.1%}" for name, size in list(sizes.items())[:4])
    return Finding(
        f"{most}, {sizes[most] / whole:.1%} of bytes",
        _judged(most == claim.value),
        f"of the bytes: {shares}; {bits_per_weight(at.file.tensors):.2f} bits a weight on average, "
        f"{claim.value} itself {own_bits}",
    )


def _block_bits(type_name: str) -> float:
    """Bits a weight of a tensor type, its scales included.

    >>> _block_bits("IQ1_S"), _block_bits("Q8_0")
    (1.5625, 8.5)
    """
    block, size = next((block, size) for name, block, size in TENSOR_TYPES.values() if name == type_name)
    return 8 * size / block


@check
def quantization_family(claim: Claim, at: Evidence) -> Finding:
    """The family that the type's name in ggml says: IQ... for i-quants, Q..._K for k-quants."""
    found = family(claim.args["type"])
    return Finding(
        found,
        _judged(found == claim.value),
        f"ggml names the type {claim.args['type']}: {found}; k-quants are named like Q2_K",
    )


def family(type_name: str) -> str:
    """The family of a tensor type.

    >>> family("IQ1_S"), family("Q2_K"), family("Q8_0")
    ('i-quant', 'k-quant', 'neither')
    """
    if type_name.startswith("IQ"):
        return "i-quant"
    return "k-quant" if type_name.endswith("_K") else "neither"


# ---- the file ----


@check
def merged(claim: Claim, at: Evidence) -> Finding:
    """The sizes of the published shards added up; a merge would drop the second shard's header."""
    shards, single = registered()[SHARDS], registered()[SINGLE]
    terms = " + ".join(f"{one.size_bytes:,}" for one in shards.files)
    if shards.size_bytes != single.size_bytes:
        return Finding(
            f"{single.size_bytes - shards.size_bytes:+,} bytes",
            NOT_TESTABLE,
            f"{terms} = {shards.size_bytes:,}, and the file has {single.size_bytes:,} bytes",
        )
    return Finding(
        "a raw concatenation",
        CONTRADICTED,
        f"{terms} = {shards.size_bytes:,} bytes, exactly the single file: the second shard's header stands "
        "inside it, so it was concatenated and not reindexed; `dfqs-nb repair` makes the merge of it",
    )


@check
def sha256(claim: Claim, at: Evidence) -> Finding:
    """The hash of the file at hand where it is the artifact, else of an independent download."""
    own = at.stages.get("merge", {}).get("model", {})
    is_single = at.file is not None and own.get("nbytes") == at.nbytes
    found = own["sha256"] if is_single else at.published["independent_sha256"]
    who = "this run's file has" if is_single else "an independent download of the file is recorded with"
    means = "the file is authentic" if found == claim.value else "the file is another one"
    return Finding(
        f"{found[:16]}...",
        _judged(found == claim.value),
        f"{who} SHA-256 {found[:16]}...: {means}; a hash says which file it is, not that it loads",
    )


@check
def loads(claim: Claim, at: Evidence) -> Finding:
    """What llama.cpp says of the reference model's shards put end to end, as the published file's are."""
    if registered()[SHARDS].size_bytes != registered()[SINGLE].size_bytes:
        return Finding("not known", NOT_TESTABLE, "the published file is no concatenation by its size")
    seen = (
        f"an independent download shows {at.published['independent_tensors']:,} of "
        f"{at.published['all_tensors']:,} tensors to a reader of its first header"
    )
    if not at.ask_llama_cpp:
        return Finding(
            "a raw concatenation",
            CONTRADICTED,
            f"the published file is two shards put end to end by its size; {seen}",
        )
    reason = _concatenation_refused()
    if not reason:
        return Finding(
            "loads", NOT_TESTABLE, "this llama.cpp opens the reference model's shards put end to end"
        )
    return Finding(
        "refused",
        CONTRADICTED,
        "the published file is two shards put end to end by its size, and llama.cpp refuses such a file "
        f"({reason}); {seen}",
    )


@lru_cache(maxsize=1)
def _concatenation_refused() -> str:
    """Why llama.cpp refuses the reference model's shards put end to end; empty where it does not."""
    from dfqs_nb.gguf.broken import glue
    from dfqs_nb.llama.check import loader_verdict

    with tempfile.TemporaryDirectory() as folder:
        path = glue(folder)
        reason = loader_verdict(path).reason
    return reason.split(":")[0].strip()


# ---- memory and disk ----


@check
def kv_cache(claim: Claim, at: Evidence) -> Finding:
    """llama.cpp's allocation from the shapes, f16, with and without swa_full; then every other cache type."""
    n_ctx = claim.args["n_ctx"]
    sizes = {
        (name, full): kv_cache_bytes(at.shape, n_ctx, type_k=name, type_v=name, swa_full=full).total
        for name in CACHE_TYPES
        for full in (False, True)
    }
    window, whole = sizes["f16", False], sizes["f16", True]
    fitting = [f"{name}, swa_full={full}" for (name, full), size in sizes.items() if claim.agrees(size / GB)]
    said = (
        f"at {n_ctx:,} tokens the f16 cache takes {_gb(window)}, and {_gb(whole)} with swa_full, computed "
        f"from {at.basis}"
    )
    found = f"{window / GB:.2f} GB, {whole / GB:.2f} GB with swa_full"
    if fitting:
        return Finding(found, CONFIRMED, f"{said}; {claim.figure} is the cache with {fitting[0]}")
    return Finding(
        found,
        CONTRADICTED,
        f"{said}; none of {len(sizes)} settings (type of the cache, swa_full) gives {claim.figure}",
    )


def _needs(at: Evidence, n_ctx: int) -> tuple[int, int | None]:
    """Bytes of weights and cache; and these with the compute buffer that llama.cpp plans."""
    least = at.weights + kv_cache_bytes(at.shape, n_ctx).total
    planned = read_spec("requirements")["envelope"]["published_compute"].get(str(n_ctx))
    return least, least + planned["plain"] if planned else None


@check
def holds(claim: Claim, at: Evidence) -> Finding:
    """Weights, KV cache and compute buffer, against the memory that is said to hold them."""
    least, whole = _needs(at, claim.args["n_ctx"])
    need = whole or least
    low, high = claim.value[0] * GB, claim.value[-1] * GB
    parts = "weights, KV cache and compute buffer" if whole else "weights and KV cache"
    said = f"{parts} take {_gb(need)} at {claim.args['n_ctx']:,} tokens (f16 cache)"
    if need > high:
        return Finding(_gb(need), CONTRADICTED, f"{said}, more than {claim.figure}")
    tight = f"; {claim.value[0]} GB alone are too few" if need > low else ""
    return Finding(
        _gb(need),
        CONFIRMED,
        f"{said}{tight}; with less memory the mapped weights are read from the disk again and again",
    )


@check
def usage(claim: Claim, at: Evidence) -> Finding:
    """Weights and KV cache, which any run holds somewhere, against the memory that a run is said to take."""
    least, _ = _needs(at, claim.args["n_ctx"])
    said = f"weights and KV cache alone take {_both(least)} at {claim.args['n_ctx']:,} tokens"
    if least > claim.value * GB:
        in_gib = least <= claim.value * GIB
        return Finding(
            _gb(least),
            CONTRADICTED,
            f"{said}, more than {claim.figure}" + (f"; {claim.value} GiB would hold them" if in_gib else ""),
        )
    return Finding(
        _gb(least), NOT_TESTABLE, f"{said}, so {claim.figure} are possible; it takes that machine to measure"
    )


@check
def storage(claim: Claim, at: Evidence) -> Finding:
    """The file, and where two shards are to be merged the shards beside it, against the storage named."""
    need = at.nbytes * (2 if claim.args.get("merge") else 1)
    beside = claim.args.get("merge")
    what = "the shards and a merged file beside them take" if beside else "the file alone takes"
    if need <= claim.value * GB:
        return Finding(_gb(need), CONFIRMED, f"{what} {_both(need)}")
    in_gib = f"; {claim.value} GiB would hold it" if need <= claim.value * GIB else ""
    return Finding(_gb(need), CONTRADICTED, f"{what} {_both(need)}, more than {claim.figure}{in_gib}")


@check
def offload(claim: Claim, at: Evidence) -> Finding:
    """Bytes of that many whole layers, against the memory of the GPUs named."""
    layers, room = int(claim.value), claim.args["gpu_gb"] * GB
    n_layers = int(at.shape.arch("block_count"))
    if at.file is not None:
        last = range(n_layers - layers, n_layers)
        need = sum(tensor.nbytes for tensor in at.file.tensors if layer_of(tensor.name) in last)
        some = f"the last {layers} of {n_layers}" if layers < n_layers else f"all {n_layers}"
        what = f"{some} layers take"
    else:
        need = round(at.active.routed_total * layers / n_layers)
        what = f"the routed experts of {layers} of {n_layers} layers alone take about"
    if need > room:
        return Finding(
            _gb(need),
            CONTRADICTED,
            f"{what} {_both(need)}, more than the {claim.args['gpu_gb']} GB named; fewer fit, or more where "
            "experts stay in RAM",
        )
    return Finding(
        _gb(need),
        NOT_TESTABLE,
        f"{what} {_both(need)}, which {claim.args['gpu_gb']} GB can hold; it takes that machine to run it",
    )


# ---- speed ----


@check
def speed(claim: Claim, at: Evidence) -> Finding:
    """The bound that reading a token's weights sets on that machine, and the artifact's measured speed."""
    table = scores_speed.card_table(at.active).set_index("machine")
    bound = float(table.loc[claim.args["machine"], "bound"])
    low, high = claim.value[0], claim.value[-1]
    said = (
        f"a token reads {_gb(at.active.total)} of weights, so that machine ({claim.args['machine']}) allows "
        f"at most {bound:,.1f} tokens/s"
    )
    if low > bound:
        return Finding(f"at most {bound:,.1f} tokens/s", CONTRADICTED, f"{said}, less than {claim.figure}")
    share = f"{said}; the claim's upper end is {high / bound:.1%} of that"
    measured = at.stages.get("scores", {}).get("cpu_tokens_per_sec")
    if not claim.args.get("measured") or at.file is None or measured is None:
        other = claim.args.get("measured") and measured is not None
        why = at.subject if other else "it takes that machine to measure"
        return Finding(f"at most {bound:,.1f} tokens/s", NOT_TESTABLE, f"{share}; {why}")
    inside = low <= measured <= high
    return Finding(
        f"{measured:,.2f} tokens/s",
        _judged(inside),
        f"this machine's CPU gave {measured:,.2f} tokens/s; {share}",
    )


# ---- quality and behaviour ----


@check
def score(claim: Claim, at: Evidence) -> Finding:
    """The score of the same set on the artifact, by its 95 % interval."""
    scored = at.stages.get("scores", {})
    found = next((one for one in scored.get("scores", ()) if one["set"] == claim.args["set"]), None)
    if at.file is None:
        return Finding("not measured", NOT_TESTABLE, at.subject)
    if found is None or found.get("value") is None or found.get("n_missing"):
        return Finding(
            "not measured",
            NOT_TESTABLE,
            f"this run has no complete score of {claim.args['set']} (tier: {scored.get('tier', 'none')})",
        )
    low, high = 100 * found["low"], 100 * found["high"]
    return Finding(
        f"{100 * found['value']:.1f} %",
        _judged(low <= claim.value <= high),
        f"{100 * found['value']:.1f} % (95 % interval {low:.1f} to {high:.1f}, n = {found['n']})",
    )


@check
def routing(claim: Claim, at: Evidence) -> Finding:
    """Notebook 04's judgement of the same statement, where the artifact was traced."""
    rows = at.stages.get("routing", {}).get("claims", ())
    found = next((one for one in rows if one["claim"] == claim.args["claim"]), None)
    if found is None:
        return Finding("not measured", NOT_TESTABLE, "this run has no traces of routing")
    if at.file is None:
        return Finding(
            "not measured", NOT_TESTABLE, f"{at.subject}; there it is {found['status']} ({found['evidence']})"
        )
    return Finding(found["status"], found["status"], found["evidence"])


@check
def gradual(claim: Claim, at: Evidence) -> Finding:
    """No two neighbouring lengths (at most a doubling apart) of the curve have intervals that do not meet."""
    curve = sorted(at.stages.get("long_context", {}).get("curve", ()), key=lambda row: row["length"])
    if len(curve) < 2:
        return Finding("not measured", NOT_TESTABLE, "this run has no curve over lengths")
    steps = [(a, b) for a, b in zip(curve, curve[1:], strict=False) if b["high"] < a["low"]]
    falls = curve[-1]["high"] < curve[0]["low"]
    ends = (
        f"accuracy {curve[0]['accuracy']:.2f} at {curve[0]['length']:,} tokens, {curve[-1]['accuracy']:.2f} "
        f"at {curve[-1]['length']:,}"
    )
    said = (
        f"{ends}; {len(steps)} of {len(curve) - 1} steps from a length to the next fall by more than their "
        "95 % intervals"
    )
    if at.file is None:
        return Finding("not measured", NOT_TESTABLE, f"{at.subject}; there: {said}")
    if not falls and not steps:
        return Finding(
            "no fall", NOT_TESTABLE, f"no degradation up to {curve[-1]['length']:,} tokens: {said}"
        )
    return Finding("sudden" if steps else "gradual", CONTRADICTED if steps else CONFIRMED, said)


# ---- what this run, or any run, cannot check ----


@check
def not_measured(claim: Claim, at: Evidence) -> Finding:
    """Not by this workbook: the evidence says why."""
    return Finding("not measured", NOT_TESTABLE, claim.args["why"])


@check
def not_checkable(claim: Claim, at: Evidence) -> Finding:
    """By nobody afterwards: the evidence says why."""
    return Finding("not checkable", NOT_CHECKABLE, claim.args["why"])
