"""Archives of strangers: what is wrong with them is named, and nothing in them runs."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from typer.testing import CliRunner

from instep.cli import app
from instep.models.errors import ModelError
from instep.models.folder import load_model
from instep.models.module.archive import read_archive
from instep.models.module.archived_step import ArchivedStep, import_pt2
from tests.support.archives import (
    CONSTANTS,
    MODEL,
    SAMPLES,
    WEIGHTS,
    Odds,
    imported,
    members,
    rewrite,
    save,
    save_cell,
)
from tests.support.steps import FEATURES
from tests.support.warm import run_instep


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)


class Trap:
    """Unpickling it leaves a file."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def pickled(value: Any) -> bytes:
    torch.save(value, (saved := io.BytesIO()))
    return saved.getvalue()


def test_no_payload_in_an_archive_runs_whether_it_is_imported_or_refused() -> None:
    save_cell()
    sound = members()
    pickle.loads(pickle.dumps(Trap()))
    assert Path("ran").exists(), "the trap works"
    Path("ran").unlink()
    rewrite(sound | {SAMPLES: pickled(Trap()), "net/extra/more.pt": pickle.dumps(Trap())})
    assert imported()[0] == 0
    assert load_model("net").state.row_bytes == 128
    config = json.loads(sound[WEIGHTS])
    config["config"]["head.bias"]["use_pickle"] = True
    odd = {"config": {"obj": {"path_name": "custom_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}}}
    for harm, sentence in (
        (
            {WEIGHTS: json.dumps(config).encode(), "net/data/weights/weight_5": pickled(Trap())},
            "net.pt2: the archive keeps head.bias (data/weights/weight_5) as a pickle, and reading one runs code",
        ),
        (
            {CONSTANTS: json.dumps(odd).encode(), "net/data/constants/custom_obj_0": pickle.dumps(Trap())},
            "net.pt2: the archive keeps obj (data/constants/custom_obj_0) as a pickle",
        ),
        (
            {"net/data/weights/model.pt": pickled(Trap())},
            "net.pt2: the archive keeps data/weights/model.pt as a pickle",
        ),
        (
            {"net/data/constants/model.pt": pickled(Trap())},
            "net.pt2: the archive keeps data/constants/model.pt as a pickle",
        ),
        ({MODEL: json.dumps({"range_constraints": {"__import__('os')": {}}}).encode()}, "schema_version"),
    ):
        rewrite(sound | harm)
        for command in (["model", "import", "--overwrite"], ["model", "info"], ["serve"]):
            result = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command, "net.pt2"])
            assert result.exit_code == 2, result.output
            words = sentence if "import" in command else "is a program of torch.export and not a model folder"
            assert words in " ".join(result.stderr.split())
    rewrite({f"serialized_{name}.pt": pickled(Trap()) for name in ("state_dict", "constants", "example_inputs")})
    assert (
        "keeps serialized_state_dict.pt, serialized_constants.pt, serialized_example_inputs.pt as"
        in imported("--overwrite")[1]
    )
    assert not Path("ran").exists()


Change = Callable[[dict[str, Any]], Any]


def at(path: str, value: Any) -> Change:
    """Sets what a path such as `config.w.use_pickle` names."""
    *way, last = path.split("/")

    def change(content: Any) -> None:
        for part in way:
            content = content[int(part) if part.isdecimal() else part]
        content[int(last) if last.isdecimal() else last] = value

    return change


def call(target: str, **inputs: Any) -> Change:
    """Puts a call in front of the others."""
    given = [{"name": name, "arg": arg, "kind": 1} for name, arg in inputs.items()]
    node = {"target": target, "inputs": given, "outputs": [{"as_tensor": {"name": "new"}}], "metadata": {}}
    return lambda content: content["graph_module"]["graph"]["nodes"].insert(0, node)


X: Final = {"as_tensor": {"name": "x"}}
META: Final = "config/head.weight/tensor_meta"
GRAPH: Final = "graph_module/graph"
SIZE: Final = {"as_int": 2**38}
HUGE_AND_EMPTY: Final = {
    "dtype": 7,
    "sizes": [SIZE, SIZE, {"as_int": 0}],
    "strides": [SIZE] * 3,
    "storage_offset": SIZE,
    "layout": 7,
}
CODE: Final = "__import__('pathlib').Path('ran').touch()"


@pytest.mark.parametrize(
    ("member", "change", "sentence"),
    [
        (MODEL, at("schema_version/major", 7), "has version 7 of torch.export's schema, and version 8 can be read"),
        (MODEL, at("graph_module", []), r"models/model.json is not in torch's form \(graph_module"),
        (MODEL, at(f"{GRAPH}/nodes", "text"), "is not in torch's form"),
        (MODEL, call("torch.ops.aten.from_file.default", filename={"as_string": "ran"}), "calls aten.from_file"),
        (MODEL, call("torch.ops.aten.__class__.__init__", self=X), "calls torch.ops.aten.__class__.__init__, .* lacks"),
        (MODEL, call("torch.ops.aten.add.out", self=X, other=X, out=X), "calls aten.add, which cannot be served"),
        (MODEL, call("torch.ops.profiler._record_function_enter.default"), "calls profiler._record_function_enter"),
        (MODEL, call("builtins.eval", source={"as_string": CODE}), "calls eval, which cannot be served"),
        (MODEL, call("os.system", command={"as_string": "touch ran"}), "calls system, which cannot be served"),
        (MODEL, call("_operator.pow", a={"as_int": 9}, b={"as_int": 9**9}), "calls pow, which cannot be served"),
        (MODEL, call("_operator.mul", a={"as_string": "x"}, b={"as_int": 2**39}), "arithmetic is for sizes only"),
        (MODEL, call("torch.ops.aten.abs.default", self=X, **{CODE: X}), "with arguments that it does not have"),
        (MODEL, call("torch.ops.aten.abs.default", self={"as_tensor": {"name": "gone"}}), "uses 'gone', which nothing"),
        (MODEL, call("torch.ops.aten.abs.default", self={"as_graph": {}}), "takes or gives a graph, for which"),
        (MODEL, call("torch.ops.aten.abs.default", self={}), "takes or gives a"),
        (MODEL, call("torch.ops.aten.abs.default"), "torch.export cannot follow the step"),
        (
            MODEL,
            call("torch.ops.aten.ones.default", size={"as_ints": [2**20, 2**20]}),
            "the step takes more than 2,147,483,648 bytes",
        ),
        (MODEL, call("torch.ops.aten.ones.default", size={"as_ints": [10**1000]}), "torch.export cannot follow"),
        (MODEL, at(f"{GRAPH}/tensor_values/x/sizes/1", SIZE), "cannot follow|takes more than"),
        (MODEL, at(f"{GRAPH}/tensor_values/x/dtype", 99), "x is not a dense tensor with a batch"),
        (MODEL, at(f"{GRAPH}/outputs", []), "other inputs or outputs than its signature"),
        (MODEL, at(f"{GRAPH}/nodes", [{"target": "t", "inputs": [], "outputs": []}] * 20_001), "at most 20000 items"),
        (MODEL, at("graph_module/module_call_graph/0/signature/in_spec", "[1, "), "is not in torch's form"),
        (MODEL, at("graph_module/module_call_graph/0/signature/in_spec", "[1," * 9999), "is not in torch's form"),
        (MODEL, at("graph_module/signature/input_specs/0/parameter/parameter_name", "gone"), "lacks the tensor 'gone'"),
        (
            MODEL,
            at("graph_module/signature/input_specs/0", {"custom_obj": {"custom_obj_name": "o"}}),
            "uses o, which is",
        ),
        (MODEL, lambda content: content.clear(), "schema_version"),
        (
            WEIGHTS,
            at(f"{META}/sizes/0", SIZE),
            r"head.weight in data/weights/weight_\d asks for more than the 384 bytes",
        ),
        (WEIGHTS, at(f"{META}/sizes/0", {"as_int": -3}), "is not in torch's form"),
        (WEIGHTS, at(f"{META}/sizes/0", {"as_expr": {"expr_str": CODE}}), "has sizes or strides that no tensor has"),
        (WEIGHTS, at(f"{META}/sizes", [{"as_int": 2}] * 99), "is not in torch's form"),
        (WEIGHTS, at(f"{META}/strides/0", {"as_int": 2**38}), "asks for more than"),
        (WEIGHTS, at(f"{META}/strides", []), "has sizes or strides that no tensor has"),
        (WEIGHTS, at(f"{META}/storage_offset", {"as_int": 1}), "asks for more than"),
        (WEIGHTS, at(META, HUGE_AND_EMPTY), "has sizes or strides that no tensor has"),
        (WEIGHTS, at(f"{META}/dtype", 29), "is not a dense tensor of a plain dtype"),
        (WEIGHTS, at(f"{META}/layout", 1), "is not a dense tensor of a plain dtype"),
        (WEIGHTS, at("config/head.weight/path_name", "../../models/model.json"), "has no data/weights/../../models"),
        (WEIGHTS, at("config/head.weight/path_name", "/etc/passwd"), "has no data/weights//etc/passwd"),
        (WEIGHTS, at("config/head.weight/path_name", "\x1b[31m"), "is not in torch's form"),
        (
            WEIGHTS,
            at("config/head.weight/tensor_meta", None),
            "is not a dense tensor",
        ),
        (CONSTANTS, at("config", 3), "model_constants_config.json is not in torch's form"),
    ],
)
def test_an_archive_that_was_changed_is_refused_with_a_sentence(member: str, change: Change, sentence: str) -> None:
    save_cell()
    whole = members()
    content = json.loads(whole[member])
    change(content)
    rewrite(whole | {member: json.dumps(content).encode()})
    with pytest.raises(ModelError, match=sentence) as refused:
        import_pt2("net.pt2", "net")
    assert str(refused.value).startswith("net.pt2")
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 2000
    assert not Path("ran").exists()
    assert not Path("net").exists()


def test_names_and_lines_of_code_in_an_archive_are_never_code() -> None:
    save_cell()
    whole, code = members(), json.dumps(CODE).encode()
    renamed = {name: content.replace(b'"head.weight"', code) for name, content in whole.items()}
    rewrite(whole | {name: renamed[name] for name in (MODEL, WEIGHTS)})
    assert "a tensor of the step is called" in imported()[1]
    line = json.dumps(f'File "a.py", line 1, in forward\n    x\r\u2028{CODE}\n{CODE}')
    content = json.loads(whole[MODEL])
    for node in content["graph_module"]["graph"]["nodes"]:
        node["metadata"]["stack_trace"] = json.loads(line)
    rewrite(whole | {MODEL: json.dumps(content).encode()})
    assert imported()[0] == 0
    call("torch.ops.aten.randn_like.default", self=X)(content)
    content["graph_module"]["graph"]["nodes"][0]["metadata"]["stack_trace"] = json.loads(line)
    rewrite(whole | {MODEL: json.dumps(content).encode()})
    assert f"net.pt2: the step (a.py, line 1: x{CODE}) draws random numbers" in imported("--overwrite")[1]
    assert not Path("ran").exists()


def test_a_long_trace_in_an_archive_is_read_at_once() -> None:
    save_cell()
    whole = members()
    content = json.loads(whole[MODEL])
    call("torch.ops.aten.randn_like.default", self=X)(content)
    for trace, words in (
        ('File "a.py", line 1, in ' * 50_000, "the step draws"),
        ('File "' + "a/" * 100_000 + 'b.py", line 1, in f\n  x\n', "the step (b.py, line 1: x) draws"),
    ):
        content["graph_module"]["graph"]["nodes"][0]["metadata"]["stack_trace"] = trace
        rewrite(whole | {MODEL: json.dumps(content).encode()})
        begun = time.process_time()
        assert words in imported()[1]
        assert time.process_time() - begun < 3


def test_what_torch_logs_of_a_broken_graph_is_not_shown() -> None:
    save_cell()
    whole = members()
    content = json.loads(whole[WEIGHTS])
    at(f"{META}/sizes", [{"as_int": 1}] * 2)(content)
    rewrite(whole | {WEIGHTS: json.dumps(content).encode()})
    refused = run_instep(["model", "import", "net.pt2"])
    assert (refused.returncode, refused.stdout, len(refused.stderr.splitlines())) == (2, "", 1), refused.stderr
    assert refused.stderr.startswith("net.pt2: torch.export cannot follow the step (RuntimeError: ")


def test_an_archive_from_a_machine_with_a_gpu_is_served_on_this_one() -> None:
    save_cell()
    assert imported("--output", "here")[0] == 0
    cpu, gpu = b'"type": "cpu", "index": null', b'"type": "cuda", "index": 0'
    rewrite({name: content.replace(cpu, gpu) for name, content in members().items()})
    assert imported("--output", "there")[0] == 0
    assert load_model("there").fingerprint == load_model("here").fingerprint


def test_files_that_are_no_archive_as_torch_writes_it() -> None:
    save_cell()
    whole, original = members(), Path("net.pt2").read_bytes()

    def compressed() -> None:
        with zipfile.ZipFile("net.pt2", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("net/data/weights/weight_0", bytes(10**8))

    def twice() -> None:
        rewrite({name: content for name, content in whole.items() if name != MODEL} | {MODEL: whole[MODEL]})
        content = Path("net.pt2").read_bytes()
        Path("net.pt2").write_bytes(content.replace(b"net/data/weights/weight_1", b"net/data/weights/weight_0"))

    def overlapping() -> None:
        rewrite({f"net/{at}": bytes(1000) for at in range(9)})
        content = bytearray(Path("net.pt2").read_bytes())
        entry = content.find(b"PK\x01\x02")
        struct.pack_into("<II", content, entry + 20, len(content) - 100, len(content) - 100)
        Path("net.pt2").write_bytes(content)

    weights = json.loads(whole[WEIGHTS])["config"]["head.weight"]["path_name"]
    damaged = original.replace(whole[f"net/data/weights/{weights}"], bytes(384))
    for change, sentence in (
        (lambda: Path("net.pt2").write_bytes(b""), "net.pt2: it is not an archive of torch.export.save"),
        (lambda: Path("net.pt2").write_bytes(original[:-30]), "net.pt2: the archive holds no programs of torch.export"),
        (lambda: Path("net.pt2").write_bytes(damaged), "net.pt2: the archive is damaged (Bad CRC-32"),
        (lambda: Path("net.pt2").write_bytes(b"PK\x01\x02" * 30_000), "it has too many members"),
        (compressed, "the archive has compressed or encrypted members"),
        (twice, "the archive has two members of one name"),
        (overlapping, "the archive has members that overlap"),
        (lambda: rewrite(whole | {"net/byteorder": b"big"}), "a machine of the other byte order"),
        (lambda: rewrite(whole | {MODEL: b"[" * 100_000}), "models/model.json is not JSON"),
        (lambda: rewrite(whole | {MODEL: b"\xff"}), "models/model.json is not JSON"),
        (lambda: rewrite(whole | {MODEL: b"{" + b" " * 2**23}), "and at most 8,388,608 are read"),
        (
            lambda: rewrite({name: content for name, content in whole.items() if name != WEIGHTS}),
            "net.pt2: the archive has no data",
        ),
        (
            lambda: rewrite({"net/data/aotinductor/model/a.so": b""}),
            "net.pt2: the archive holds compiled code; save one step",
        ),
        (lambda: rewrite({"a.txt": b"hello"}), "the archive holds no programs of torch.export; save one step"),
        (Path("net.pt2").unlink, "No such file or directory"),
        (Path("net.pt2").mkdir, "cannot read"),
    ):
        change()
        status, said = imported()
        assert status == 2
        assert sentence in said
    assert not Path("net").exists()


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (("graph", "nodes"), [1] * 15_000, r"nodes\.0: 1 is wrong"),
        (("graph", "outputs"), [1] * 15_000, r"outputs\.0: 1 is wrong"),
        (("graph", "tensor_values"), {str(at): 1 for at in range(20_001)}, "tensor_values: at most 20,000 keys"),
        (("signature", "input_specs"), [{str(at): 1 for at in range(20_001)}], r"input_specs\.0: at most 20,000 keys"),
    ],
)
def test_of_many_wrong_values_in_a_graph_one_is_enough(path: tuple[str, str], value: Any, sentence: str) -> None:
    save_cell()
    whole = members()
    program = json.loads(whole[MODEL])
    program["graph_module"][path[0]][path[1]] = value
    rewrite(whole | {MODEL: json.dumps(program).encode()})
    with pytest.raises(ModelError, match=sentence) as refused:
        import_pt2("net.pt2", "net")
    assert str(refused.value).count("; ") == 1, "each would take a kilobyte of memory"


def test_archives_with_random_changes_are_read_or_refused_and_never_fail_otherwise() -> None:
    save(Odds().eval(), torch.randn(3, FEATURES), (torch.zeros(3, FEATURES), torch.zeros(3, dtype=torch.int64)))
    whole, draw = members(), random.Random(5)
    sentences: list[str] = []
    values: list[Any] = [
        None,
        True,
        -1,
        2**70,
        1.5,
        "x",
        "as_int",
        [],
        {},
        [[]],
        {"as_int": 2**39},
        {"as_tensor": {"name": "x"}},
    ]
    for _ in range(250):
        member = draw.choice([MODEL, MODEL, WEIGHTS, CONSTANTS])
        content = part = json.loads(whole[member])
        for _ in range(draw.randrange(2, 12)):
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            key = draw.choice(keys)
            if not part[key] or not isinstance(part[key], dict | list):
                break
            parent, part = part, part[key]
        else:
            part, key = parent, key
        part[key] = draw.choice(values)
        rewrite(whole | {member: json.dumps(content).encode()})
        try:
            ArchivedStep(read_archive(Path("net.pt2").read_bytes())).check_sizes()
        except ModelError as refused:
            sentences.append(str(refused))
    assert 20 < len(sentences) < 230
    assert all("\n" not in sentence for sentence in sentences)
