"""Shipped layer maps, what identifies their models, and everything that --layers may say."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hxaconv.errors import HxaconvError
from hxaconv.model import layer_maps
from hxaconv.model.config import student_of, teacher_config
from hxaconv.options import Layers

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = {
    "reka-flash-3": (44, [8, 15, 22, 29, 36, 43]),
    "reka-flash-3-12-layers": (44, [4, 8, 11, 15, 18, 22, 25, 29, 32, 36, 39, 43]),
    "qwen3-0.6b": (28, [12, 16, 21, 24, 25]),
    "qwen3-1.7b": (28, [17, 19, 21, 23, 25, 27]),
    "qwen3-4b": (36, [15, 20, 24, 29, 33, 34]),
    "qwen3-4b-2507": (36, [15, 20, 24, 29, 33, 34]),
    "qwen3-8b": (36, [15, 20, 26, 29, 33, 34]),
    "qwen3-32b": (64, [5, 11, 17, 23, 28, 33, 38, 43, 48, 53, 58, 63]),
    "qwen3-30b-a3b-2507": (48, [5, 11, 17, 23, 29, 35, 41, 47]),
    "seed-oss-36b": (64, [6, 13, 20, 27, 33, 39, 45, 51, 57, 63]),
    "devstral-small": (40, [4, 9, 14, 19, 23, 27, 31, 35, 39]),
    "magistral-small": (40, [4, 9, 14, 19, 24, 29, 34, 39]),
}
REKA = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 6144,
    "intermediate_size": 19648,
    "num_attention_heads": 64,
    "num_hidden_layers": 44,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 8000000,
    "tie_word_embeddings": False,
    "vocab_size": 100352,
}


def config_of(name):
    model = dict(layer_maps.load(name).model)
    model.setdefault("tie_word_embeddings", False)
    return teacher_config({"hidden_act": "silu", "sliding_window": None, **model}, where=name)


def test_shipped_maps_are_the_published_choices():
    maps = layer_maps.shipped()
    assert {name: (m.num_hidden_layers, list(m.gqa_layers)) for name, m in maps.items()} == PUBLISHED
    for m in maps.values():
        assert m.title
        assert m.source
        assert m.model_ids
        assert m.model["rope_theta"]
        assert m.model["rms_norm_eps"]
        assert m.model["hidden_size"]
        assert layer_maps.check(m.gqa_layers, m.num_hidden_layers) == []


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"),
    [
        (44, 6, [8, 15, 22, 29, 36, 43]),
        (40, 8, [4, 9, 14, 19, 24, 29, 34, 39]),
        (48, 8, [5, 11, 17, 23, 29, 35, 41, 47]),
        (36, 9, [3, 7, 11, 15, 19, 23, 27, 31, 35]),
        (28, 5, [7, 12, 17, 22, 27]),
        (61, 12, [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60]),
    ],
)
def test_uniform_reproduces_published_choices(num_layers, count, expected):
    assert list(layer_maps.uniform(num_layers, count)) == expected


def test_uniform_by_default_takes_a_seventh():
    assert list(layer_maps.uniform(44)) == [8, 15, 22, 29, 36, 43]
    assert layer_maps.uniform(6) == (5,)
    assert layer_maps.uniform(2, 0) == ()
    with pytest.raises(HxaconvError, match="3 GQA layers requested, the model has 2"):
        layer_maps.uniform(2, 3)


def test_the_real_reka_config_is_recognised():
    path = ROOT.parent / "shared" / "reka-flash-3" / "config.json"
    raw = json.loads(path.read_text()) if path.is_file() else REKA
    config = teacher_config(raw, where="reka")
    found = layer_maps.match(config)
    assert found is not None
    assert found.name == "reka-flash-3"  # not the 12-layer one, which must be asked for
    assert layer_maps.match(student_of(config, (1,))).name == "reka-flash-3"


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 1e6},
        {"num_hidden_layers": 43},
        {"vocab_size": 100353},
        {"rms_norm_eps": 1e-6},
        {"tie_word_embeddings": True},
        {"model_type": "mistral"},
        {"intermediate_size": 19712},
    ],
)
def test_a_model_that_differs_in_anything_is_not_recognised(change):
    assert layer_maps.match(replace(teacher_config(REKA, where="reka"), **change)) is None


def test_models_of_one_shape_are_told_apart_by_name_only():
    config = config_of("devstral-small")
    assert layer_maps.match(config) is None
    assert layer_maps.match(config, ["mistralai/Devstral-Small-2507@main"]).name == "devstral-small"
    assert layer_maps.match(config, ["/models/Magistral-Small-2509/"]).name == "magistral-small"
    assert layer_maps.match(config, ["mistralai/Mistral-Small-3.1-24B-Base-2503"]) is None
    # One shape, two values of rope_theta: no name is needed.
    assert layer_maps.match(config_of("qwen3-4b")).name == "qwen3-4b"
    assert layer_maps.match(config_of("qwen3-4b-2507")).name == "qwen3-4b-2507"


def test_a_map_survives_being_written(tmp_path):
    for original in layer_maps.shipped().values():
        path = tmp_path / f"{original.name}.toml"
        path.write_text(layer_maps.dump(original, ["why", "two\nlines"]), encoding="utf-8")
        assert replace(layer_maps.load(path), label=original.label) == original
    odd = layer_maps.LayerMap(name="odd", gqa_layers=(1,), title='quote " back \\ new\nline é', model_ids=("a/b",))
    (tmp_path / "odd.toml").write_text(layer_maps.dump(odd), encoding="utf-8")
    assert layer_maps.load(tmp_path / "odd.toml").title == odd.title


def test_a_user_file_may_be_one_line(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("gqa_layers = [3, 1]")
    assert layer_maps.parse_layers(str(path), 6) == (1, 3)
    with pytest.raises(HxaconvError, match="out of range"):
        layer_maps.parse_layers(str(path), 3)


def test_a_broken_file_is_explained_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text(
        'gqa_layers = [2, 2, 9, -1]\ntitel = "x"\nvariant = "hxa07z"\n'
        "[model]\nnum_hidden_layers = 4\nrope_teta = 1.0\nrms_norm_eps = true\n"
    )
    with pytest.raises(HxaconvError) as caught:
        layer_maps.load(path)
    for part in (
        "'titel'",
        "did you mean title?",
        "rope_teta",
        "rms_norm_eps is True",
        "9",
        "more than once: 2",
        "'hxa07z'",
    ):
        assert part in str(caught.value)
    path.write_text("gqa_layers = [1")
    with pytest.raises(HxaconvError, match="not valid TOML"):
        layer_maps.load(path)


def test_the_variant_of_a_maps_student_is_said_where_another_is_made(tmp_path):
    path = tmp_path / "m.toml"
    path.write_text('gqa_layers = [1]\nvariant = "hxa07a"\n')
    config = teacher_config(REKA, where="test")
    for variant, words in (("hxa07a", "layer map m"), ("hxa079", "layer map m, of a student that is hxa07a; this one")):
        layers, reason = layer_maps.choose(config, "t", Layers(layer_map=str(path)), variant)
        assert layers == (1,)
        assert reason.startswith(words) and (variant == "hxa079" or reason == words)


def test_unknown_names_point_to_the_nearest():
    with pytest.raises(HxaconvError, match="did you mean reka-flash-3"):
        layer_maps.load("reka_flash3")
    with pytest.raises(HxaconvError, match="no such file"):
        layer_maps.load("maps/mine.toml")
    with pytest.raises(HxaconvError, match="Shipped maps: devstral-small"):
        layer_maps.load("zzzzzz")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("8,15-17,-1", (8, 15, 16, 17, 43)),
        (" 43 , 8 ", (8, 43)),
        ("-3--1", (41, 42, 43)),
        ("none", ()),
        ("all", tuple(range(44))),
        ("reka-flash-3", (8, 15, 22, 29, 36, 43)),
    ],
)
def test_what_layers_may_say(text, layers):
    assert layer_maps.parse_layers(text, 44) == layers


def test_everything_wrong_with_layers_is_said_at_once():
    with pytest.raises(HxaconvError) as caught:
        layer_maps.parse_layers("0,3,3,99,-45,x,9-5,7-", 44)
    for part in ("out of range (the last is 43): -45, 99", "more than once: 3", "layer 0 as GQA", "zero v_first",
                 "'x'", "9-5 runs backwards", "'7-'"):  # fmt: skip
        assert part in str(caught.value)
    assert layer_maps.parse_layers("0,3", 44, allow_layer_0=True) == (0, 3)
    with pytest.raises(HxaconvError, match="write `none`"):
        layer_maps.parse_layers(" ", 44)
    with pytest.raises(HxaconvError, match="write `all`"):
        layer_maps.parse_layers("0-43", 44)
    with pytest.raises(HxaconvError, match="for 44 layers, the model has 40"):
        layer_maps.parse_layers("reka-flash-3", 40)


def test_an_installed_package_finds_its_maps(tmp_path):
    """In a wheel the folder layer_maps/ lies inside the package."""
    package = shutil.copytree(ROOT / "hxaconv", tmp_path / "hxaconv")
    (package / "layer_maps").mkdir()
    (package / "layer_maps" / "only.toml").write_text("gqa_layers = [2]")
    code = "from hxaconv.model import layer_maps; print(list(layer_maps.shipped()), layer_maps.load('only').gqa_layers)"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == "['only'] (2,)"


def test_the_wheel_takes_the_folder_along():
    text = (ROOT / "pyproject.toml").read_text()
    assert '"layer_maps" = "hxaconv/layer_maps"' in text


def test_a_file_and_its_layers_in_the_model_are_judged_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('titel = "x"\ngqa_layers = [2, 2, 0, 9]\n')
    with pytest.raises(HxaconvError) as caught:
        layer_maps.parse_layers(str(path), 6)
    for part in ("'titel'", "more than once: 2", "out of range (the last is 5): 9", "layer 0 as GQA"):
        assert part in str(caught.value)
    path.write_text("gqa_layers = 3")
    with pytest.raises(HxaconvError) as caught:
        layer_maps.load(str(path), 6)
    assert "no layer is named" not in str(caught.value)
    path.write_text("gqa_layers = [2, 2]\n[model]\nnum_hidden_layers = 4")
    with pytest.raises(HxaconvError, match=r"(?s)it is for 4 layers, the model has 6.*more than once: 2"):
        layer_maps.load(str(path), 6)


@pytest.mark.parametrize("text", ["1 3", "1-3-4"])
def test_what_is_not_understood_is_not_called_empty(text):
    with pytest.raises(HxaconvError, match="is not a layer number") as caught:
        layer_maps.parse_layers(text, 6)
    assert "no layer is named" not in str(caught.value)


def test_a_folder_is_called_one(tmp_path):
    with pytest.raises(HxaconvError, match="that is a folder, expected a TOML file"):
        layer_maps.load(tmp_path)


def test_a_hint_fits_what_is_wrong(tmp_path):
    def hint(text, option="--gqa-layers"):
        with pytest.raises(HxaconvError) as caught:
            layer_maps.parse_layers(text, 6, option=option)
        return caught.value.hint

    assert hint("0") == "" and "numbered from 0" in hint("0,9")
    assert "Without a map, name the layers by their numbers" in hint("reka-flash-3")
    (tmp_path / "sample.txt").write_text("Once upon a time")
    assert "A minimal map is one line" in hint(str(tmp_path / "sample.txt"))
    (tmp_path / "map.toml").write_text("gqa_layers = [2, 2]")
    assert hint(str(tmp_path / "map.toml")) == "Correct the file."
