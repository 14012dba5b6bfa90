"""Recognition backbones: names, shapes and numbers of the published networks; files; settings that cannot work."""

from functools import cache

import pytest
import torch
from torch import nn

from recognition.backbones import BACKBONES, build_backbone, load_backbone, num_parameters, save_backbone
from tests.compat import fill_deterministic, load_arrays, load_shapes, relative_error
from utils.checkpoint import save_safetensors
from utils.config import CONFIG_DIR, UserError


@cache
def on_meta(name: str) -> nn.Module:
    """The published network without values; nothing may change it."""
    with torch.device("meta"):
        return build_backbone(name)


@pytest.mark.parametrize("name", ["IR_18", "IR_50", "IR_101", "IR_SE_50"])
def test_keys_and_shapes_are_the_published_ones(name: str) -> None:
    state = on_meta(name.lower()).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == load_shapes(f"tface_{name}")


@pytest.mark.parametrize("name", ["IR_18", "IR_50"])
def test_outputs_are_the_published_ones(name: str) -> None:
    arrays = load_arrays("recognition_backbones")
    backbone = fill_deterministic(build_backbone(name.lower()))
    with torch.no_grad():
        out = backbone(torch.from_numpy(arrays["image"]))
    assert relative_error(out, arrays[name]) < 1e-4


def test_names() -> None:
    depths, iresnet_depths = (18, 34, 50, 101, 152, 200), (18, 34, 50, 100, 200)
    assert (
        *(f"ir_{d}" for d in depths),
        *(f"ir_se_{d}" for d in depths),
        *(f"iresnet{d}" for d in iresnet_depths),
        "mobilefacenet",
    ) == BACKBONES


def test_every_name_has_a_config_that_says_it(compose) -> None:
    files = sorted(path.stem for path in (CONFIG_DIR / "backbone").glob("*.yaml"))
    assert files == sorted(BACKBONES)
    for name in files:
        assert compose("recognition_train_config", f"backbone={name}").backbone.name == name


@pytest.mark.parametrize("name", ["ir_34", "ir_se_18", "ir_se_152", "iresnet34", "mobilefacenet"])
def test_each_family_maps_images_to_features(name: str) -> None:
    backbone = build_backbone(name, input_size=32, num_features=48, width=0.125)
    out = backbone(torch.zeros(2, 3, 32, 32))
    assert out.shape == (2, 48)
    assert (backbone.input_size, backbone.num_features, backbone.config["name"]) == (32, 48, name)


@pytest.mark.parametrize(
    ("name", "units", "widest"),
    [("ir_34", 16, 512), ("ir_152", 50, 2048), ("ir_200", 66, 2048), ("ir_se_101", 49, 512)],
)
def test_units_and_widths(name: str, units: int, widest: int) -> None:
    backbone = on_meta(name)
    assert len(backbone.body) == units
    assert backbone.output_layer[0].num_features == widest


def test_width_and_stem_make_it_smaller_and_input_size_only_changes_the_last_linear() -> None:
    with torch.device("meta"):
        full, narrow, small = (
            build_backbone("ir_18", **kw) for kw in ({}, {"width": 0.5}, {"input_size": 64, "stem_stride": 2})
        )
    assert narrow.body[0].res_layer[1].weight.shape == (32, 32, 3, 3)
    assert small.output_layer[3].weight.shape == (512, 512 * 2 * 2)
    assert full.body[7].res_layer[4].weight.shape == small.body[7].res_layer[4].weight.shape


# Trainable parameters in millions
MILLIONS = {
    **{"ir_18": 24.02, "ir_34": 34.13, "ir_50": 43.59, "ir_101": 65.15, "ir_152": 109.64, "ir_200": 114.14},
    **{"ir_se_18": 24.11, "ir_se_34": 34.29, "ir_se_50": 43.81},
    **{"ir_se_101": 65.52, "ir_se_152": 116.21, "ir_se_200": 121.24},
    **{"iresnet18": 24.03, "iresnet34": 34.14, "iresnet50": 43.59, "iresnet100": 65.16, "iresnet200": 118.83},
    "mobilefacenet": 1.20,
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_builds_with_its_number_of_parameters(name: str) -> None:
    assert num_parameters(on_meta(name)) / 1e6 == pytest.approx(MILLIONS[name], abs=0.005)


def test_mobilefacenet_is_table_1_of_its_paper() -> None:
    with torch.device("meta"):
        backbone = build_backbone("mobilefacenet", num_features=128)
        x, sides = torch.empty(2, 3, 112, 112), []
        for layer in (*backbone.stem, *backbone.body, *backbone.output_layer[:2]):
            x = layer(x)
            sides.append(x.shape[-1])
    assert sides == [56] * 2 + [28] * 5 + [14] * 7 + [7] * 4 + [1]
    units = [(unit.depthwise[0].in_channels, unit.project[0].out_channels, unit.has_shortcut) for unit in backbone.body]
    assert units == [
        *[(128, 64, False), *[(128, 64, True)] * 4],
        *[(256, 128, False), *[(256, 128, True)] * 6],
        *[(512, 128, False), *[(256, 128, True)] * 2],
    ]
    assert backbone.output_layer[1][0].weight.shape == (512, 1, 7, 7)
    norms = sum(num_parameters(module) for module in backbone.modules() if isinstance(module, nn.BatchNorm2d))
    folded = num_parameters(backbone) - norms // 2  # a batch norm folded into its convolution leaves a bias
    assert folded == 993_216  # 0.99 million in the paper


@pytest.mark.parametrize("name", ["ir_se_18", "mobilefacenet"])
def test_file_round_trip(tmp_path, name: str) -> None:
    backbone = fill_deterministic(build_backbone(name, input_size=32, num_features=16, width=0.25, dropout=0.1))
    save_backbone(backbone, tmp_path / "backbone.safetensors")
    loaded = load_backbone(tmp_path / "backbone.safetensors")
    assert loaded.config == backbone.config
    assert not loaded.training
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), backbone(images))


def test_load_backbone_refuses_other_files(tmp_path) -> None:
    with pytest.raises(UserError, match="no such"):
        load_backbone(tmp_path / "none.safetensors")
    save_safetensors({"a": torch.zeros(1)}, tmp_path / "other.safetensors", {"kind": "vq_encoder"})
    with pytest.raises(UserError, match="looks like a VQ encoder written by this project"):
        load_backbone(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("name", "prefix", "affine"), [("ir_18", "", False), ("ir_18", "module.", True), ("iresnet18", "", False)]
)
def test_published_files_are_recognised(tmp_path, name: str, prefix: str, affine: bool) -> None:
    backbone = fill_deterministic(build_backbone(name, input_size=32, affine_output=True if affine else None))
    state = {prefix + k: v for k, v in backbone.state_dict().items() if "num_batches_tracked" not in k}
    torch.save(state, tmp_path / "published.pth")
    loaded = load_backbone(tmp_path / "published.pth")
    assert loaded.config["name"] == name and loaded.input_size == 32
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(images), backbone(images))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "ir_19"}, "unknown backbone 'ir_19'.*ir_18, ir_34"),
        ({"name": "ir_18", "input_size": 100}, "input_size: 100.*multiple of 16"),
        ({"name": "ir_18", "input_size": 112, "stem_stride": 2}, "input_size: 112.*multiple of 32"),
        ({"name": "ir_18", "width": 0.0}, "width: 0.0"),
        ({"name": "ir_18", "dropout": 1.0}, "dropout: 1.0"),
        ({"name": "ir_18", "num_features": 0}, "num_features: 0"),
        ({"name": "iresnet18", "affine_output": True}, "affine_output"),
        ({"name": "mobilefacenet", "input_size": 96, "stem_stride": 2}, "stem_stride: 2; mobilefacenet.*wants 1"),
        ({"name": "mobilefacenet", "bottleneck": True}, "backbone.bottleneck: they belong to the IR networks"),
        ({"name": "iresnet18", "inner_norm": False}, "inner_norm, backbone.bottleneck: they belong to the IR networks"),
    ],
)
def test_settings_that_cannot_work_are_named(kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_backbone(**kwargs)
