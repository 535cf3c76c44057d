from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import nn

import instep.models
from instep.models.errors import ModelError
from instep.models.folder import load_model, make_model, model_from_parts, write_model
from instep.models.gru.description import DenseLayer, GruDescription, GruLayers
from instep.models.gru.modules import save_model
from instep.models.model import Model, model_of

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


def test_torch_modules_in_folder_out(tmp_path: Path) -> None:
    torch.manual_seed(3)
    gru = nn.GRU(5, 3, 2, dropout=0.3, batch_first=True)
    before, after = nn.Linear(2, 5, bias=False), nn.Linear(3, 4)
    folder = tmp_path / "ears"
    saved = save_model(folder, gru, [(before, "relu")], [(after, "tanh")])
    assert saved.description == DESCRIPTION
    assert saved.name == "ears"
    assert same(load_model(folder), saved)

    assert yaml.safe_load((folder / "model.yaml").read_text()) == {
        "name": "ears",
        "kind": "gru",
        "features": 2,
        "before": [{"size": 5, "activation": "relu", "bias": False}],
        "gru": {"hidden_size": 3, "num_layers": 2},
        "after": [{"size": 4, "activation": "tanh"}],
    }
    stored = load_file(folder / "weights.safetensors")
    theirs = {f"gru.{name}": tensor for name, tensor in gru.state_dict().items()} | {
        "before.0.weight": before.weight,
        "after.0.weight": after.weight,
        "after.0.bias": after.bias,
    }
    assert stored.keys() == theirs.keys()
    assert all(torch.equal(stored[name], theirs[name]) for name in stored)


def test_a_gru_alone_without_biases(tmp_path: Path) -> None:
    save_model(tmp_path / "m", nn.GRU(3, 4, bias=False), name="no biases")
    model = load_model(tmp_path / "m")
    assert model.name == "no biases"
    assert model.description == GruDescription(features=3, gru=GruLayers(hidden_size=4, bias=False))


def test_training_on_does_not_change_what_was_saved(tmp_path: Path) -> None:
    gru = nn.GRU(3, 4)
    model = save_model(tmp_path / "m", gru)
    before = model.weights["gru.weight_ih_l0"].clone()
    with torch.no_grad():
        gru.get_parameter("weight_ih_l0").add_(1)
    assert torch.equal(model.weights["gru.weight_ih_l0"], before)
    assert not model.weights["gru.weight_ih_l0"].requires_grad


def test_modules_that_cannot_be_served_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    with pytest.raises(ModelError, match="a bidirectional GRU cannot stream: its backward direction"):
        save_model(folder, nn.GRU(3, 4, bidirectional=True))
    with pytest.raises(ModelError, match=r"the GRU takes 3 values but before\[1\] gives 6;"):
        save_model(folder, nn.GRU(3, 4), before=[(nn.Linear(2, 5), "none"), (nn.Linear(5, 6), "none")])
    with pytest.raises(ModelError, match=r"after\[0\] takes 5 values but the GRU gives 4;"):
        save_model(folder, nn.GRU(3, 4), after=[(nn.Linear(5, 6), "none")])
    with pytest.warns(UserWarning, match="zero-element"):
        nothing = nn.Linear(4, 0)
    with pytest.raises(ModelError, match=r"do not make a network: size: "):
        save_model(folder, nn.GRU(3, 4), after=[(nothing, "none")])
    with pytest.raises(ModelError, match=r"tensor gru\.weight_ih_l0 of the given modules is float64; convert"):
        save_model(folder, nn.GRU(3, 4).double())
    gru = nn.GRU(3, 4, 2)
    with torch.no_grad():
        gru.get_parameter("bias_hh_l1")[2] = math.nan
    with pytest.raises(ModelError, match=r"tensor gru\.bias_hh_l1 of the given modules holds NaN"):
        save_model(folder, gru)
    with pytest.raises(ModelError, match="a model's name must be 1 to 100 printable characters, not ''"):
        save_model(folder, nn.GRU(3, 4), name="")
    assert not folder.exists()


LINEAR = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("module", "sentence"),
    [
        (nn.LSTM(3, 4), "an nn.LSTM is not a GRU"),
        (nn.RNN(3, 4), "an nn.RNN is not a GRU"),
        (
            nn.GRUCell(3, 4),
            r"an nn.GRUCell is one step of a GRU: make an nn.GRU .* \(weight_ih to weight_ih_l0, and so",
        ),
        (nn.Sequential(nn.GRU(3, 4)), "an nn.Sequential is not a GRU: give its nn.GRU as gru"),
        ({}, "dict is not a GRU: give the network's torch.nn.GRU"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_gru_is_called_by_its_name(tmp_path: Path, module: Any, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        save_model(tmp_path / "m", module)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        (LINEAR, r"it is one Linear"),
        ([LINEAR], r"after\[0\] is one Linear"),
        ((LINEAR, "none"), r"after\[0\] is one Linear"),
        ([(LINEAR, "none"), (LINEAR,)], r"after\[1\] is one tuple"),
        ([("none", LINEAR)], r"after\[0\] begins with one str"),
        ("ab", r"it is one str"),
        ([(LINEAR, "mish")], r"the activation of after\[0\] is 'mish'; it must be one of 'none', 'relu', 'tanh', 'sig"),
        ([(LINEAR, nn.ReLU())], r"the activation of after\[0\] is ReLU\(\); it must be one of"),
    ],
)
def test_dense_layers_that_are_no_pairs_are_told_what_to_be(tmp_path: Path, layers: Any, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence) as refused:
        save_model(tmp_path / "m", nn.GRU(3, 4), after=layers)
    if "activation of" not in sentence:
        assert str(refused.value).startswith(
            "after must be a list of pairs of an nn.Linear and its activation, as in [("
        )
    assert not (tmp_path / "m").exists()


def test_a_model_shows_itself_in_one_line(tmp_path: Path) -> None:
    model = make_model(DESCRIPTION, "constant", name="ears")
    # before 5·2; GRU 9·(5+3)+18 and 9·(3+3)+18; after 4·3+4
    assert repr(model) == (
        "<Model 'ears': 2 features → dense 5 relu → GRU 3 × 2 layers → dense 4 tanh; "
        f"{10 + 90 + 72 + 16} parameters, fingerprint {model.fingerprint[:12]}>"
    )


def test_the_two_for_users_are_in_the_package_and_take_text_as_a_folder(tmp_path: Path) -> None:
    saved = instep.models.save_model(str(tmp_path / "m"), nn.GRU(3, 4))
    assert same(instep.models.load_model(str(tmp_path / "m")), saved)
    with pytest.raises(AttributeError, match=r"module 'instep\.models' has no attribute 'sav_model'"):
        getattr(instep.models, "sav_model")  # noqa: B009 (a type checker refuses the other way)


def test_constant_initialisation() -> None:
    model = make_model(DESCRIPTION, "constant", name="c", weight=2, bias=-1)
    assert {name: tuple(tensor.shape) for name, tensor in model.weights.items()} == DESCRIPTION.tensor_shapes()
    for name, tensor in model.weights.items():
        assert tensor.dtype == torch.float32
        assert set(tensor.flatten().tolist()) == {-1.0 if ".bias" in name else 2.0}
    with pytest.raises(ModelError, match=r"tensor before\.0\.weight of the initialisation holds NaN or infinity"):
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
    path = tmp_path / "w.safetensors"
    seen = {model.fingerprint}
    for name in model.weights:
        weights = {key: tensor.clone() for key, tensor in model.weights.items()}
        weights[name].view(torch.int32).flatten()[-1] ^= 1  # the last bit of the last weight
        save_file(weights, path)
        seen.add(model_from_parts(DESCRIPTION, path, "one").fingerprint)
    save_file(dict(model.weights), path)
    relu = DESCRIPTION.model_copy(update={"after": (DenseLayer(size=4, activation="relu"),)})
    seen.add(model_from_parts(relu, path, "one").fingerprint)
    assert len(seen) == len(model.weights) + 2


def test_the_parts_may_stand_apart(tmp_path: Path) -> None:
    model = make_model(DESCRIPTION, "random", name="parts")
    write_model(tmp_path, model)
    assert same(model_from_parts(DESCRIPTION, tmp_path / "weights.safetensors", "parts"), model)
    with pytest.raises(ModelError, match="printable"):
        model_from_parts(DESCRIPTION, tmp_path / "weights.safetensors", "a\nb")
    with pytest.raises(ModelError, match=r"nothing\.safetensors"):
        model_from_parts(DESCRIPTION, tmp_path / "nothing.safetensors", "parts")


def test_writing_replaces_a_model_only_when_asked_to(tmp_path: Path) -> None:
    old = make_model(DESCRIPTION, "random", name="old")
    write_model(str(tmp_path), old)
    new = make_model(GruDescription(features=1, gru=GruLayers(hidden_size=1)), "random", name="neu é")
    with pytest.raises(
        ModelError, match=r"holds a model already; choose another folder, or .*: overwrite=True, or --o"
    ):
        write_model(tmp_path, new)
    with pytest.raises(ModelError, match="holds a model already"):
        save_model(tmp_path, nn.GRU(3, 4))
    assert same(load_model(tmp_path), old)
    write_model(tmp_path, new, overwrite=True)
    assert same(load_model(tmp_path), new)
    assert same(save_model(tmp_path, nn.GRU(3, 4), overwrite=True), load_model(tmp_path))
    (tmp_path / "model.yaml").unlink()
    with pytest.raises(ModelError, match="holds a model already"):  # half of one is somebody's, too
        write_model(tmp_path, new)
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="cannot write the model folder"):
        write_model(tmp_path / "file", new)


def test_a_folder_without_a_name_in_it_is_called_as_the_folder(tmp_path: Path) -> None:
    write_model(tmp_path / "ears", make_model(DESCRIPTION, "random", name="other"))
    path = tmp_path / "ears" / "model.yaml"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True) if "name" not in line))
    assert load_model(tmp_path / "ears").name == "ears"


def test_outputs_have_names_where_the_folder_gives_them(tmp_path: Path) -> None:
    names = ["yes", "no", "perhaps", "42"]
    weights = dict(make_model(DESCRIPTION, "random", name="m").weights)
    saved = model_of("m", DESCRIPTION, weights, tuple(names))
    write_model(tmp_path, saved)
    assert yaml.safe_load((tmp_path / "model.yaml").read_text())["outputs"] == names
    found = load_model(tmp_path)
    assert found.output_names == tuple(names)
    assert found.fingerprint == model_of("m", DESCRIPTION, weights).fingerprint, "a name is no part of the network"


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        ("[a, b, c]", "outputs: 3 names for 4 outputs; give one for each, or leave them out"),
        ("[a, b, c, a]", "outputs: two outputs have the name 'a'; give each its own"),
        ("[a, b, yes, d]", "outputs: a name must be 1 to 100 printable characters, not True; put it in quotes"),
        ('[a, b, "", d]', "outputs: a name must be 1 to 100 printable characters, not ''"),
        ("abcd", "outputs: expected a list of names, one for each output, not 'abcd'"),
    ],
)
def test_names_that_do_not_fit_the_outputs_are_refused(tmp_path: Path, outputs: str, sentence: str) -> None:
    write_model(tmp_path, make_model(DESCRIPTION, "random", name="m"))
    with (tmp_path / "model.yaml").open("a") as file:
        file.write(f"outputs: {outputs}\n")
    with pytest.raises(ModelError, match=rf"model\.yaml: {sentence}"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- 1\n", "must hold the keys of a network's description"),
        ("", "must hold the keys of a network's description"),
        ("features: [1\n", "is not YAML: "),
        ("\xff\xfe\x00".encode("latin-1"), "is not YAML: "),
        ("features: 2\n", r"model\.yaml: gru: Field required"),
        ("features: 0\ngru: {hidden_size: x}\n", r"features: Input should be .*; gru\.hidden_size: Input should be"),
        (
            "features: 2\ngru: {hidden_size: 3, bidirectional: true}\n",
            r"gru\.bidirectional: a bidirectional GRU cannot",
        ),
        ("features: 2\ngru: {hidden_size: 3}\nhead: 1\n", "head: Extra inputs are not permitted"),
        ("1: 2\nfeatures: 2\ngru: {hidden_size: 3}\n", "1: Keys should be strings"),
        (
            "name: 5\nfeatures: 2\ngru: {hidden_size: 3}\n",
            "a model's name must be 1 to 100 printable characters, not 5",
        ),
    ],
)
def test_a_bad_model_yaml_is_refused(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    (tmp_path / "model.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ModelError, match=sentence):
        load_model(tmp_path)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot read .*No such file.*a model folder holds model\.yaml and weights"):
        load_model(tmp_path / "nothing")
    write_model(tmp_path, make_model(DESCRIPTION, "random", name="m"))
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot read the weights"):
        load_model(tmp_path)
