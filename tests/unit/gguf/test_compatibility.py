"""The compatibility check, held to llama.cpp's real loader: files that differ from the reference model in one
thing each, loaded, given a context and decoded with in a child process."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import gguf_fixtures as fixtures
import pytest
from conftest import REFERENCE
from gguf_fixtures import Spec, field

from dfqs_nb.gguf.compatibility import (
    _GENERAL_KEYS,
    _LAYER_TENSORS,
    _MODEL_KEYS,
    _MODEL_TENSORS,
    check_compatibility,
    compatibility_table,
)
from dfqs_nb.gguf.header import GGUFHeader, read_header
from dfqs_nb.gguf.shards import open_shards
from dfqs_nb.llama.loader import Verdict, llama_cpp_verdicts

KEYS = (*_GENERAL_KEYS, *_MODEL_KEYS)
VALUE_OF = {"UINT32": 7, "INT32": 7, "FLOAT32": 0.5, "BOOL": 1, "STRING": "x", "UINT64": 7}

# Mutants on which we are stricter than this llama.cpp on purpose, each with its reason.
STRICTER: dict[str, str] = {}
# Mutants that llama.cpp refuses and the check does not report, each with its reason.
NOT_JUDGED: dict[str, str] = {
    "value tokenizer.ggml.pre": "the list of pre-tokenizers changes with every version of llama.cpp",
}


@dataclass(frozen=True)
class Model:
    """A model taken apart: metadata records and tensors, to be put together with a change."""

    fields: dict[str, bytes]
    specs: tuple[Spec, ...]

    def bytes(self) -> bytes:
        return fixtures.gguf_bytes(list(self.fields.values()), self.specs)

    def without_field(self, name: str) -> Model:
        return replace(self, fields={key: record for key, record in self.fields.items() if key != name})

    def with_field(self, name: str, kind: str, value: object) -> Model:
        return replace(self, fields={**self.fields, name: field(name, kind, value)})

    def change(self, target: str, /, **changes: object) -> Model:
        return replace(
            self, specs=tuple(_changed(spec, changes) if spec.name == target else spec for spec in self.specs)
        )

    def without(self, name: str) -> Model:
        return replace(self, specs=tuple(spec for spec in self.specs if spec.name != name))

    def with_tensor(self, spec: Spec) -> Model:
        return replace(self, specs=(*self.without(spec.name).specs, spec))


def _changed(spec: Spec, changes: dict[str, object]) -> Spec:
    new = replace(spec, **changes)
    return new if new.nbytes == len(spec.bytes()) else replace(new, data=bytes(new.nbytes))


@pytest.fixture(scope="module")
def model(merged_reference: Path) -> Model:
    header, blob = read_header(merged_reference), merged_reference.read_bytes()
    fields = {
        name: header.raw[slice(*one.record)]
        for name, one in header.fields.items()
        if not name.startswith(("split.", "quantize."))
    }
    specs = tuple(
        Spec(t.name, t.type_code, t.shape, data=blob[header.data_offset + t.offset :][: t.nbytes])
        for t in header.tensors
    )
    return Model(fields, specs)


@pytest.fixture(scope="module")
def reference(merged_reference: Path) -> GGUFHeader:
    return read_header(merged_reference)


Mutants = Iterator[tuple[str, Callable[[Model], Model]]]


def key_mutants(header: GGUFHeader) -> Mutants:
    """Each key of the tables removed, and given a value of another type."""
    for name, kind, _ in KEYS:
        if name in header:
            yield f"no {name}", lambda m, n=name: m.without_field(n)
        for other in (
            "UINT32",
            "INT32",
            "FLOAT32",
            "BOOL",
            "STRING",
            "UINT64",
            "[UINT32]",
            "[FLOAT32]",
            "[STRING]",
            "[UINT8]",
        ):
            if other.strip("[]") == kind.strip("[]*") and other.startswith("[") <= (
                "*" in kind or "[" in kind
            ):
                continue
            value = [VALUE_OF.get(other.strip("[]"), 1)] * 4 if other.startswith("[") else VALUE_OF[other]
            yield f"{name} as {other}", lambda m, n=name, o=other, v=value: m.with_field(n, o, v)


def value_mutants() -> Mutants:
    """Values that the loader, or the first graph, does not accept; and some that it does."""
    a = "deepseek4."
    for key, kind, values in (
        ("block_count", "UINT32", (0, 3, 5, 513)),
        ("nextn_predict_layers", "UINT32", (1, 5)),
        ("expert_count", "UINT32", (0, 8, 2048)),
        ("expert_used_count", "UINT32", (0, 1, 17)),
        ("expert_group_count", "UINT32", (1, 2, 3, 16, 99)),
        ("rope.scaling.type", "STRING", ("yarn", "none", "what")),
        ("attention.compress_ratios", "[INT32]", ([0, 4, 128], [0, 4, 128, 4, 4], [0, 8, 128, 4], [4] * 513)),
        ("attention.compress_ratios", "INT32", (4,)),
        ("expert_gating_func", "UINT32", (1, 2, 3)),
        ("hyper_connection.count", "UINT32", (1, 2, 3, 8)),
        ("attention.value_length", "UINT32", (32,)),
        ("hyper_connection.sinkhorn_iterations", "UINT32", (0, 1)),
        ("attention.output_group_count", "UINT32", (1, 3, 4)),
        ("attention.head_count", "UINT32", (0, 2)),
        ("attention.head_count", "[UINT32]", ([4] * 4, [4] * 3)),
        ("attention.head_count_kv", "UINT32", (2, 0)),
        ("attention.key_length", "UINT32", (32, 128)),
        ("rope.dimension_count", "UINT32", (64, 66, 128, 0)),
        ("attention.indexer.key_length", "UINT32", (32, 128)),
        ("attention.indexer.head_count", "UINT32", (2,)),
        ("attention.indexer.top_k", "UINT32", (1, 4096)),
        ("attention.q_lora_rank", "UINT32", (64,)),
        ("attention.output_lora_rank", "UINT32", (32,)),
        ("hash_layer_count", "UINT32", (0, 2, 9)),
        ("embedding_length", "UINT32", (512,)),
        ("expert_feed_forward_length", "UINT32", (128,)),
        ("expert_feed_forward_length", "[UINT32]", ([256] * 4, [256])),
        ("expert_shared_count", "UINT32", (0, 2)),
        ("swiglu_clamp_exp", "FLOAT32", (7.0,)),
        ("swiglu_clamp_exp", "[FLOAT32]", ([7.0] * 3,)),
        ("attention.sliding_window", "UINT32", (1, 4096)),
        ("attention.causal", "BOOL", (0, 1)),
        ("context_length", "UINT32", (1,)),
        ("embedding_length_out", "UINT32", (256,)),
    ):
        for value in values:
            shown = f"{len(value)} of {value[0]}.." if isinstance(value, list) and len(value) > 9 else value
            yield f"{a}{key} = {shown} ({kind})", lambda m, k=a + key, t=kind, v=value: m.with_field(k, t, v)


def tokenizer_mutants(header: GGUFHeader) -> Mutants:
    tokens = header["tokenizer.ggml.tokens"]
    for name in ("model", "tokens", "merges", "token_type", "pre"):
        yield f"no tokenizer.ggml.{name}", lambda m, n=name: m.without_field(f"tokenizer.ggml.{n}")
    for name, kind, value in (
        ("model", "UINT32", 1),
        ("tokens", "[UINT32]", [1] * 768),
        ("tokens", "STRING", "x"),
        ("tokens", "[STRING]", [*tokens[:-1], tokens[0]]),
        ("merges", "[UINT32]", [1]),
        ("merges", "STRING", "x"),
        ("merges", "[STRING]", []),
        ("token_type", "[UINT32]", [1] * 768),
        ("token_type", "[INT32]", [1] * 700),
        ("token_type", "INT32", 1),
        ("scores", "[FLOAT32]", [0.0] * 10),
        ("scores", "[FLOAT32]", [0.0] * 768),
        ("scores", "[UINT8]", [0] * 768),
        ("pre", "UINT32", 1),
    ):
        shown = f"{kind} of {len(value)}" if isinstance(value, list) else f"{kind} {value}"
        if (name, shown) == ("tokens", "[STRING] of 768"):
            shown = "with one twice"
        yield (
            f"tokenizer.ggml.{name} {shown}",
            lambda m, n=name, k=kind, v=value: m.with_field(f"tokenizer.ggml.{n}", k, v),
        )
    yield (
        "tokenizer.ggml.tokens of 700",
        lambda m: m.with_field("tokenizer.ggml.tokens", "[STRING]", tokens[:700]),
    )
    yield (
        "value tokenizer.ggml.pre",
        lambda m: m.with_field("tokenizer.ggml.pre", "STRING", "nobody knows it"),
    )


def tensor_mutants(header: GGUFHeader) -> Mutants:
    """Each tensor of the first three layers (plain and hash, ratio 4, ratio 128) removed, renamed, reshaped and
    given other types."""
    for tensor in header.tensors:
        name, shape = tensor.name, tensor.shape
        if name.startswith("blk.3."):
            continue
        yield f"no {name}", lambda m, n=name: m.without(n)
        yield (
            f"{name} renamed",
            lambda m, n=name: m.change(n, name=n.replace(".weight", ".wait").replace(".bias", ".weight")),
        )
        wider = (*shape[:-1], shape[-1] + 1) if len(shape) > 1 else (shape[0] + 1,)
        yield f"{name} of {wider}", lambda m, n=name, s=wider: m.change(n, shape=s)
        if len(shape) > 1:
            flat = (shape[0], tensor.n_elements // shape[0] // 2, 2)
            yield f"{name} of {flat}", lambda m, n=name, s=flat: m.change(n, shape=s)
        yield f"{name} of {(*shape, 1)}", lambda m, n=name, s=(*shape, 1): m.change(n, shape=s[:4])
    for tensor in header.tensors:
        name, shape = tensor.name, tensor.shape
        if name.startswith(("blk.3.", "blk.2.")) and "compressor" not in name:
            continue
        for kind in ("F32", "F16", "BF16", "Q8_0", "I32", "I8"):
            if kind != tensor.type and (kind != "Q8_0" or shape[0] % 32 == 0):
                yield f"{name} as {kind}", lambda m, n=name, k=kind: m.change(n, type=k)


def extra_mutants() -> Mutants:
    for name, shape in (
        ("rope_freqs.weight", (16,)),
        ("blk.0.exp_probs_b.bias", (16,)),
        ("extra.weight", (8,)),
        ("blk.0.attn_compressor_norm.weight", (64,)),
        ("blk.1.exp_probs_b_vl.bias", (16,)),
        ("blk.0.exp_probs_b_vl.bias", (15,)),
        ("blk.1.ffn_up_exps.scale", (16,)),
        ("blk.1.ffn_up_exps.input_scale", (16,)),
        ("blk.1.ffn_up_shexp.scale", (1,)),
        ("blk.1.ffn_up_shexp.scale", (2,)),
        ("output.scale", (1,)),
        ("blk.4.attn_norm.weight", (256,)),
        ("blk.1.attn_kv.scale", (1,)),
    ):
        yield f"also {name} of {shape}", lambda m, n=name, s=shape: m.with_tensor(Spec(n, "F32", s))
    yield "three streams throughout", three_streams
    yield "the early dialect", early_dialect


def three_streams(model: Model) -> Model:
    """A file that is consistent and has another number of hyper-connection streams than llama.cpp's four."""
    shapes = {"output_hc_fn": (768, 3), "output_hc_base": (3,)}
    for half in ("attn", "ffn"):
        shapes |= {f"hc_{half}_fn": (768, 15), f"hc_{half}_base": (15,)}
    for spec in model.specs:
        short = spec.name.removesuffix(".weight").split(".")[-1]
        if short in shapes:
            model = model.change(spec.name, shape=shapes[short])
    return model.with_field("deepseek4.hyper_connection.count", "UINT32", 3)


def early_dialect(model: Model) -> Model:
    """Names and keys as in the first conversions."""
    model = model.without_field("deepseek4.attention.output_lora_rank")
    for spec in model.specs:
        old = (
            spec.name.replace("attn_kv.", "attn_kv_latent.")
            .replace("attn_compressor_", "attn_compress_")
            .replace("indexer_compressor_", "indexer.compress_")
            .replace("output_hc_", "hc_head_")
        )
        if "hc_" in old or "tid2eid" in old or "exp_probs_b" in old:
            old = old.removesuffix(".weight").removesuffix(".bias")
        model = model.change(spec.name, name=old)
    return model


def judge(name: str, path: Path, verdict: Verdict) -> str:
    """What is wrong with our judgement of one mutant, or an empty string."""
    ours = check_compatibility(read_header(path))
    said = f"llama.cpp: {verdict.reason or 'loads'} {verdict.death} ({verdict.stage}); ours: {ours.summary}"
    if not verdict.accepted and ours.ok and name not in NOT_JUDGED:
        return f"{name}: not reported. {said}"
    if verdict.accepted and not ours.ok and name not in STRICTER:
        return f"{name}: reported, and loads. {said}"
    if verdict.accepted or ours.ok:
        return ""
    first = ours.problems[0]
    if first.aborts != bool(verdict.death):
        return f"{name}: aborts {first.aborts}. {said}"
    text = first.consequence
    if not verdict.death and text not in verdict.reason:
        return f"{name}: other words. {said}"
    return ""


def compare(model: Model, mutants: list[tuple[str, Callable[[Model], Model]]], folder: Path) -> list[str]:
    wrong = []
    for start in range(0, len(mutants), 40):
        batch, paths = mutants[start : start + 40], []
        for number, (_, change) in enumerate(batch):
            paths.append(folder / f"mutant-{number}.gguf")
            paths[-1].write_bytes(change(model).bytes())
        verdicts = llama_cpp_verdicts(paths, trial=True)
        wrong += [
            judge(name, path, verdict)
            for (name, _), path, verdict in zip(batch, paths, verdicts, strict=True)
        ]
    return [one for one in wrong if one]


def next_token_mutants() -> Mutants:
    """A file with one more layer, which predicts a further token, and what that layer must hold."""
    yield "with a next-token layer", with_next_layer
    for name, _, _, where, required in _LAYER_TENSORS:
        if where in ("all", "scored", "next"):
            target = f"blk.4.{name}"
            yield (
                f"next-token layer, {'no' if required else 'with'} {name}",
                lambda m, t=target, r=required: with_next_layer(m).without(t) if r else with_next_layer(m),
            )
    yield (
        "next-token layer, short ratios",
        lambda m: with_next_layer(m).with_field(
            "deepseek4.attention.compress_ratios", "[INT32]", [0, 4, 128, 4]
        ),
    )


def with_next_layer(model: Model) -> Model:
    copies = tuple(
        replace(spec, name=spec.name.replace("blk.0.", "blk.4."))
        for spec in model.specs
        if spec.name.startswith("blk.0.") and "tid2eid" not in spec.name
    )
    own = (
        Spec("blk.4.exp_probs_b.bias", "F32", (16,)),
        Spec("blk.4.nextn.eh_proj.weight", "F32", (512, 256)),
        Spec("blk.4.nextn.enorm.weight", "F32", (256,)),
        Spec("blk.4.nextn.hnorm.weight", "F32", (256,)),
    )
    model = replace(model, specs=(*model.specs, *copies, *own))
    for name, kind, value in (
        ("block_count", "UINT32", 5),
        ("nextn_predict_layers", "UINT32", 1),
        ("attention.compress_ratios", "[INT32]", [0, 4, 128, 4, 0]),
        ("swiglu_clamp_exp", "[FLOAT32]", [10.0] * 5),
        ("swiglu_clamp_shexp", "[FLOAT32]", [10.0] * 5),
    ):
        model = model.with_field(f"deepseek4.{name}", kind, value)
    return model


def test_the_check_says_what_llama_cpp_does(model: Model, reference: GGUFHeader, tmp_path: Path) -> None:
    mutants = [
        *extra_mutants(),
        *tokenizer_mutants(reference),
        *list(value_mutants())[::6],
        *list(key_mutants(reference))[::16],
        *list(tensor_mutants(reference))[::40],
        *list(next_token_mutants())[::8],
    ]
    assert compare(model, mutants, tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "mutants",
    [
        lambda header: [*value_mutants(), *next_token_mutants()],
        lambda header: [*key_mutants(header)],
        lambda header: [*tensor_mutants(header)],
    ],
    ids=["values", "keys", "tensors"],
)
def test_the_check_says_what_llama_cpp_does_on_every_mutant(
    mutants, model: Model, reference: GGUFHeader, tmp_path: Path
) -> None:
    assert compare(model, mutants(reference), tmp_path) == []


@pytest.mark.slow
def test_of_two_faults_the_one_that_llama_cpp_stops_at_is_named_first(
    model: Model, reference: GGUFHeader, tmp_path: Path
) -> None:
    pools = [
        list(key_mutants(reference)),
        list(value_mutants()),
        list(tokenizer_mutants(reference))[:-1],
        list(tensor_mutants(reference)),
        list(extra_mutants()),
    ]
    draw, pairs = random.Random(20260519), []
    for _ in range(300):
        (one, change), (two, other) = draw.choice(draw.choice(pools)), draw.choice(draw.choice(pools))
        pairs.append((f"{one} + {two}", lambda m, a=change, b=other: b(a(m))))
    assert compare(model, pairs, tmp_path) == []


def test_the_reference_model_is_compatible_as_one_file_and_as_shards(reference: GGUFHeader) -> None:
    assert check_compatibility(reference).ok
    shards = open_shards(REFERENCE / "DFQS-Nano-IQ1_S-XL-00001-of-00002.gguf")
    assert check_compatibility(shards).ok
    alone = check_compatibility(shards.headers[0])
    assert not alone.ok and alone.problems[0].consequence.endswith("not found")


def test_the_tables_know_every_tensor_of_the_reference_model(reference: GGUFHeader) -> None:
    known = {name for name, *_ in (*_MODEL_TENSORS, *_LAYER_TENSORS)}
    assert {
        tensor.name.split(".", 2)[2] if tensor.name.startswith("blk.") else tensor.name
        for tensor in reference.tensors
    } <= known


def test_the_real_artifacts_shape_is_compatible_but_for_its_invented_tokens(tmp_path: Path) -> None:
    shards = fixtures.real_size_shards(tmp_path / "real")
    found = check_compatibility([read_header(path) for path in shards])
    assert [problem.item for problem in found.problems] == ["tokenizer.ggml.tokens"]


def test_the_early_dialect_is_translated(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "early.gguf"
    path.write_bytes(early_dialect(model).bytes())
    found = check_compatibility(read_header(path))
    assert found.problems[0].consequence == "key not found in model: deepseek4.attention.output_lora_rank"
    rows = {problem.item: problem.found for problem in found.problems}
    assert rows["blk.2.attn_kv.weight"] == "named 'blk.2.attn_kv_latent.weight'"
    assert rows["output_hc_fn.weight"] == "named 'hc_head_fn'"
    assert rows["blk.1.indexer_compressor_ape.weight"] == "named 'blk.1.indexer.compress_ape.weight'"
    assert rows["blk.0.ffn_gate_tid2eid.weight"] == "named 'blk.0.ffn_gate_tid2eid'"
    assert rows["blk.1.exp_probs_b.bias"] == "named 'blk.1.exp_probs_b'"
    assert "missing" not in {value for item, value in rows.items() if item.startswith(("blk.", "output"))}


def test_other_architectures_are_not_passed_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "llama.gguf"
    path.write_bytes(fixtures.gguf_bytes([field("general.architecture", "STRING", "llama")], [Spec("a")]))
    found = check_compatibility(read_header(path))
    assert (found.ok, found.checked) == (False, False)
    assert found.summary == "not checked: no table of requirements for the architecture 'llama'"


def test_the_table_has_a_row_for_each_problem(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "three.gguf"
    path.write_bytes(three_streams(model).bytes())
    found = check_compatibility(read_header(path))
    table = compatibility_table(found)
    assert table["item"].tolist() == ["deepseek4.hyper_connection.count"] and table["aborts"].tolist() == [
        True
    ]
    assert "hc == 4" in table["consequence"][0] and found.aborts


def test_a_hostile_value_is_no_crash(model: Model, tmp_path: Path) -> None:
    """Every key as an empty array and as the largest number: the check answers."""
    for name, _, _ in KEYS:
        for kind, value in (
            ("[UINT32]", []),
            ("[STRING]", ["x"]),
            ("UINT64", (1 << 64) - 1),
            ("UINT32", (1 << 32) - 1),
        ):
            path = tmp_path / "hostile.gguf"
            path.write_bytes(fixtures.header_bytes(list(model.with_field(name, kind, value).fields.values())))
            assert check_compatibility(read_header(path)).checked
