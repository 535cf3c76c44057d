from __future__ import annotations

import errno
import itertools
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from instep.models.base import Description
from instep.models.errors import ModelError
from instep.models.folder import load_model, make_model, write_model
from instep.models.model import Model, load_weights
from instep.models.recurrent.description import DenseLayer, GruDescription, GruLayers
from tests.support.steps import exported_folder

DESCRIPTION = GruDescription(
    features=2,
    before=(DenseLayer(size=5, activation="relu", bias=False),),
    gru=GruLayers(hidden_size=3, num_layers=2),
    after=(DenseLayer(size=4, activation="tanh"),),
)


def same(one: Model, other: Model) -> bool:
    return (
        (one.name, one.description, one.fingerprint) == (other.name, other.description, other.fingerprint)
        and list(one.weights) == list(other.weights)
        and all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    )


def test_constant_initialisation() -> None:
    model = make_model(DESCRIPTION, "constant", name="c", weight=2, bias=-1)
    assert {name: tuple(tensor.shape) for name, tensor in model.weights.items()} == DESCRIPTION.tensor_shapes()
    for name, tensor in model.weights.items():
        assert tensor.dtype == torch.float32
        assert set(tensor.flatten().tolist()) == {-1.0 if ".bias" in name else 2.0}
    with pytest.raises(ModelError, match=r"before\.0\.weight"):
        make_model(DESCRIPTION, "constant", name="c", weight=math.inf)


def test_random_initialisation_is_that_of_torch_in_range_and_depends_on_the_seed_alone() -> None:
    description = GruDescription(
        features=9, before=(DenseLayer(size=100),), gru=GruLayers(hidden_size=64), after=(DenseLayer(size=50),)
    )
    torch.manual_seed(1)
    one = make_model(description, "random", name="r", seed=5)
    torch.manual_seed(2)
    assert same(make_model(description, "random", name="r", seed=5), one)
    assert not same(make_model(description, "random", name="r", seed=6), one)
    bounds = {"before": 1 / 3, "gru": 1 / 8, "after": 1 / 8}
    for name, tensor in one.weights.items():
        bound = bounds[name.split(".")[0]]
        assert 0.8 * bound < float(tensor.abs().max()) <= bound
    assert len({tensor.flatten()[0].item() for tensor in one.weights.values()}) == len(one.weights)


def test_the_fingerprint_counts_every_tensor_and_the_description_but_not_the_name(tmp_path: Path) -> None:
    model = make_model(DESCRIPTION, "random", name="one")
    assert len(model.fingerprint) == 64
    assert make_model(DESCRIPTION, "random", name="two").fingerprint == model.fingerprint
    write_model(tmp_path, model)
    path = tmp_path / "weights.safetensors"
    seen = {model.fingerprint}
    for name in model.weights:
        weights = {key: tensor.clone() for key, tensor in model.weights.items()}
        weights[name].view(torch.int32).flatten()[-1] ^= 1  # the last bit of the last weight
        save_file(weights, path)
        seen.add(load_model(tmp_path).fingerprint)
    relu = DESCRIPTION.model_copy(update={"after": (DenseLayer(size=4, activation="relu"),)})
    seen.add(Model("one", relu, model.weights).fingerprint)
    assert len(seen) == len(model.weights) + 2


def test_writing_replaces_a_model_only_when_asked_to(tmp_path: Path) -> None:
    old = make_model(DESCRIPTION, "random", name="old")
    write_model(str(tmp_path), old)
    new = make_model(GruDescription(features=1, gru=GruLayers(hidden_size=1)), "random", name="neu é")
    with pytest.raises(ModelError, match="--overwrite"):
        write_model(tmp_path, new)
    assert same(load_model(tmp_path), old)
    write_model(tmp_path, new, overwrite=True)
    assert same(load_model(tmp_path), new)
    (tmp_path / "model.yaml").unlink()
    with pytest.raises(ModelError):  # half of one is somebody's, too
        write_model(tmp_path, new)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="file"):
        write_model(tmp_path / "file", new)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot become larger than this, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [0, 600], ids=["no file fits", "only the description fits"])
def test_a_model_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, size: int) -> None:
    old, new = [make_model(DESCRIPTION, "random", name="m", seed=seed) for seed in (1, 2)]
    folder = tmp_path / "old"
    write_model(folder, old)
    assert (folder / "model.yaml").stat().st_size < 600 < (folder / "weights.safetensors").stat().st_size
    (folder / "notes").touch()
    files = sorted(folder.iterdir())
    for place, overwrite in ((folder, True), (tmp_path / "new" / "folder", False)):
        with largest_file(size), pytest.raises(ModelError):
            write_model(place, new, overwrite=overwrite)
    assert (same(load_model(folder), old), sorted(folder.iterdir())) == (True, files)
    assert list(tmp_path.iterdir()) == [folder]
    (folder / "graph.json").mkdir()
    with pytest.raises(ModelError, match=r"old/graph\.json"):
        write_model(folder, new, overwrite=True)
    assert same(load_model(folder), old)


def test_nobody_reads_files_of_two_models_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = DESCRIPTION.model_copy(update={"after": (DenseLayer(size=4),)})
    gru = [make_model(each, "random", name="m", seed=seed) for seed, each in enumerate((DESCRIPTION, linear))]
    module = load_model(exported_folder("min_gru"))
    read = set[str]()

    def reads(name: str) -> None:
        change = getattr(Path, name)

        def changed(path: Path, *args: Any, **kwargs: Any) -> Any:
            result = change(path, *args, **kwargs)
            with suppress(ModelError):
                read.add(load_model(tmp_path).fingerprint)
            return result

        monkeypatch.setattr(Path, name, changed)

    write_model(tmp_path, gru[0])
    for name in ("write_bytes", "write_text", "unlink", "rename", "replace"):
        reads(name)
    for old, new in itertools.pairwise((*gru, module, gru[0])):
        write_model(tmp_path, old, overwrite=True)
        read.clear()
        write_model(tmp_path, new, overwrite=True)
        assert read == {old.fingerprint, new.fingerprint}
    assert {file.name for file in tmp_path.iterdir()} == {"model.yaml", "weights.safetensors"}


@pytest.mark.parametrize("overwrites", [True, False])
def test_a_model_that_is_replaced_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrites: bool
) -> None:
    old, new = [make_model(DESCRIPTION, "random", name="m", seed=seed) for seed in (1, 2)]
    write_model(tmp_path, old)

    def meanwhile(path: Path, description: Description) -> dict[str, torch.Tensor]:
        if overwrites:
            write_model(tmp_path, new, overwrite=True)
        else:
            (tmp_path / "model.yaml").unlink()
        return load_weights(path, description)

    monkeypatch.setattr("instep.models.folder.load_weights", meanwhile)
    with pytest.raises(ModelError):
        load_model(tmp_path)


def test_outputs_have_names_where_the_folder_gives_them(tmp_path: Path) -> None:
    names = ["yes", "no", "perhaps", "42"]
    weights = dict(make_model(DESCRIPTION, "random", name="m").weights)
    saved = Model("m", DESCRIPTION, weights, tuple(names))
    write_model(tmp_path, saved)
    assert yaml.safe_load((tmp_path / "model.yaml").read_text())["outputs"] == names
    found = load_model(tmp_path)
    assert found.output_names == tuple(names)
    assert found.fingerprint == Model("m", DESCRIPTION, weights).fingerprint, "a name is no part of the network"


@pytest.mark.parametrize(
    "outputs",
    [
        "[a, b, c]",
        "[a, b, c, a]",
        "[a, b, yes, d]",
    ],
)
def test_names_that_do_not_fit_the_outputs_are_refused(tmp_path: Path, outputs: str) -> None:
    write_model(tmp_path, make_model(DESCRIPTION, "random", name="m"))
    with (tmp_path / "model.yaml").open("a") as file:
        file.write(f"outputs: {outputs}\n")
    with pytest.raises(ModelError, match=r"model\.yaml: outputs: "):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- 1\n", "features and gru"),
        ("[" * 5000, "YAML"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nkind: *b\n", "line 2"),
        ("features: 0\ngru: {hidden_size: x}\n", r"features: 0 is wrong, .*; gru\.hidden_size: 'x'"),
        ("features: 2\ngru: {hidden_size: 3}\nhead: 1\n", "head: "),
        ("1: 2\nfeatures: 2\ngru: {hidden_size: 3}\n", "1: "),
    ],
)
def test_a_bad_model_yaml_is_refused(tmp_path: Path, text: str | bytes, named: str) -> None:
    (tmp_path / "model.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ModelError, match=named):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "content", ["user: {password: hunter2", "user: *hunter2", b"\xff hunter2", "x" * 2**20 + "hunter2"]
)
def test_what_is_no_model_yaml_is_not_quoted(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "model.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ModelError, match=r"model\.yaml") as refused:
        load_model(tmp_path)
    assert "hunter2" not in str(refused.value)


def test_a_model_yaml_that_nobody_writes_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.yaml")
    with pytest.raises(ModelError, match="regular"):
        load_model(tmp_path)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "net.pt").touch()
    for place in ("empty", "nothing", "net.pt", "x" * 300):
        with pytest.raises(ModelError, match=place):
            load_model(tmp_path / place)
    (tmp_path / "loop").symlink_to("loop")  # as with a folder that this user may not read, it may be there
    with pytest.raises(ModelError, match=os.strerror(errno.ELOOP)):
        load_model(tmp_path / "loop")
    write_model(tmp_path, make_model(DESCRIPTION, "random", name="m"))
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match="weights"):
        load_model(tmp_path)
