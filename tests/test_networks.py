"""Files of weights: which network they hold, strictly; the published key lists, and small networks with real values."""

import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion.generator import CheckpointChoice, load_generator
from diffusion.model_file import model_of_network_file
from models.autoencoder.vqgan import VQDecoder, VQEncoder, load_decoder, load_encoder
from models.diffusion.unet import ConditionalUNet
from recognition.backbones import InputAdapter, build_backbone, load_backbone
from tests.compat import DATA, deterministic_tensor, fill_deterministic, load_shapes
from tests.malicious import Call
from utils.checkpoint import SCHEDULE_BUFFERS, load_safetensors, load_torch, read_metadata, save_safetensors
from utils.checkpoint.__main__ import main as command
from utils.config import UserError
from utils.networks import (
    AUTOENCODER,
    BACKBONE,
    DECODER,
    ENCODER,
    UNET,
    autoencoder,
    open_network_file,
    recogniser,
    unet,
)

PUBLISHED = sorted(path.stem for path in (DATA / "state_dicts").glob("*.json"))
PREFIXES = {UNET: "module.eps_model.", ENCODER: "module.", DECODER: "_module.", BACKBONE: "module."}
UNET_SETTINGS = {
    "initial_channels": 32,
    "channel_multipliers": [1, 2],
    "is_attention": [False, True],
    "n_blocks_per_resolution": 1,
    "context_input_channels": 24,
    "context_channels": 32,
    "attention_head_channels": 16,
}
DDCONFIG = {
    "double_z": False,
    "z_channels": 3,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [128],
    "dropout": 0.0,
}


def unet_without_memory(**settings) -> ConditionalUNet:
    with torch.device("meta"):
        return ConditionalUNet(**settings)


def load(path: Path) -> None:
    """The loader of what the file is named after, without memory for the network itself."""
    if path.name.startswith("unet"):
        model_of_network_file(open_network_file(path))
        return
    with torch.device("meta"):
        if path.name.startswith("first_stage"):
            (load_encoder if "encoder" in path.name else load_decoder)(path)
        else:
            load_backbone(path)


def published(name: str) -> dict[str, Tensor]:
    """A state dict with the published keys and shapes, a single number behind every tensor; a schedule for a UNet."""
    kind = UNET if name.startswith("unet") else "other"
    prefix = PREFIXES.get(kind, "module.")
    number = torch.rand((), generator=torch.Generator().manual_seed(0))
    state = {prefix + key: number.expand(shape) for key, shape in load_shapes(name).items()}
    if kind == UNET:
        state |= {f"module.{buffer}": torch.linspace(0.001, 0.02, 1000) for buffer in SCHEDULE_BUFFERS}
    return state


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_keys_load_and_changes_are_named(tmp_path, monkeypatch, name):
    monkeypatch.setattr("diffusion.model_file.ConditionalUNet", unet_without_memory)
    state, path = published(name), tmp_path / f"{name}.pt"
    torch.save(state, path)
    load(path)
    prefix = "module.eps_model." if name.startswith("unet") else "module."
    keys = [key.removeprefix(prefix) for key in state if key.startswith(prefix)]
    missing, reshaped = keys[len(keys) // 3], keys[len(keys) // 2]
    del state[prefix + missing]
    state[f"{prefix}surplus.weight"] = torch.zeros(2)
    state[prefix + reshaped] = torch.zeros(7)
    torch.save(state, path)
    with pytest.raises(UserError) as info:
        load(path)
    text = info.value.args[0]
    assert f"1 missing ({missing}); 1 unexpected (surplus.weight); 1 of another shape ({reshaped} (7,) instead" in text
    assert "; the file looks like " in text


def small(kind: str, fill: bool = True) -> torch.nn.Module:
    """A little network of each family, with real values where `fill`."""
    finish = fill_deterministic if fill else torch.nn.Module.eval
    if kind.startswith("unet"):
        settings = dict(UNET_SETTINGS)
        if kind == "unet_ca":
            settings["learn_empty_context"] = True
        elif kind == "unet_classes":
            settings["n_context_classes"] = 5
        elif kind == "unet_unconditional":
            settings |= {"condition_type": "AdaGN", "is_context_conditional": False, "attention_head_channels": 32}
        else:
            settings |= {"condition_type": kind.removeprefix("unet_"), "attention_head_channels": 32}
        return finish(ConditionalUNet(**settings))
    if kind == "vq_encoder":
        return finish(VQEncoder(DDCONFIG))
    if kind == "vq_decoder":
        return finish(VQDecoder(DDCONFIG, n_embed=16))
    name, _, layout = kind.partition(" ")
    more = {
        "": {},
        "evolve": {"affine_output": True, "inner_norm": False, "bottleneck": False},
        "curricular": {"inner_norm": False, "bottleneck": False},
    }[layout]
    return finish(build_backbone(name, input_size=32, num_features=24, width=0.125, dropout=0.0, **more))


def run(kind: str, network: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        if kind.startswith("unet"):
            context = None if kind == "unet_unconditional" else torch.randn(2, 24, generator=torch.Generator())
            if kind == "unet_classes":
                context = torch.tensor([1, 4])
            return network(torch.ones(2, 3, 8, 8), torch.tensor([3, 700]), context)
        if kind == "vq_decoder":
            return network(deterministic_tensor("latents", (1, 3, 8, 8)))
        return network(deterministic_tensor("images", (2, 3, 32, 32)))


def reload(kind: str, path: Path) -> torch.nn.Module:
    if kind.startswith("unet"):
        return model_of_network_file(open_network_file(path)).unet.eval()
    return {"vq_encoder": load_encoder, "vq_decoder": load_decoder}.get(kind, load_backbone)(path)


SMALL = {  # network => the prefixes that its published files have
    "unet_ca": ("module.eps_model.", "_module.module.eps_model."),
    "unet_classes": ("eps_model.",),
    "vq_encoder": ("", "first_stage_model."),
    "vq_decoder": ("module.", "first_stage_model."),
    "ir_18": ("module.",),
    "ir_se_18 evolve": ("",),
    "ir_34 curricular": ("module.",),
    "ir_152": ("",),
    "iresnet18": ("",),
}


@pytest.mark.parametrize(("kind", "prefix"), [(kind, prefix) for kind in SMALL for prefix in SMALL[kind]])
def test_files_convert_and_give_the_same_numbers(tmp_path, capsys, kind, prefix):
    network = small(kind)
    state = {prefix + name: tensor for name, tensor in network.state_dict().items()}
    if "evolve" in kind:  # face.evoLVe numbers the gate of a unit
        state = {name.replace("se_block", "5"): tensor for name, tensor in state.items()}
    if kind.startswith("unet"):
        betas = torch.linspace(0.001, 0.02, 50)
        state |= {prefix.removesuffix("eps_model.") + name: betas for name in SCHEDULE_BUFFERS}
    torch.save({"state_dict": state} if prefix == "first_stage_model." else state, tmp_path / "network.pth")
    out = tmp_path / "network.safetensors"
    assert command(["inspect", str(tmp_path / "network.pth")]) == 0
    assert command(["convert", str(tmp_path / "network.pth"), str(out)]) == 0
    assert f"prefixes: {prefix or 'none'} (" in capsys.readouterr().out
    expected = run(kind, network)
    for path in (tmp_path / "network.pth", out):
        assert torch.equal(run(kind, reload(kind, path)), expected)
    assert open_network_file(out).config  # the converted file says what it is
    if kind.startswith("unet"):
        assert load_safetensors(out)[0]["betas"].dtype == torch.float64
        assert torch.equal(open_network_file(out).betas.float(), betas)


DESCRIBED = {
    "unet_ca": (unet.describe, lambda config: ConditionalUNet(**config)),
    "vq_encoder": (autoencoder.describe_encoder, lambda config: VQEncoder(**config)),
    "vq_decoder": (autoencoder.describe_decoder, lambda config: VQDecoder(**config)),
    "ir_se_18": (recogniser.describe_ir, lambda config: build_backbone(**config)),
    "ir_18 curricular": (recogniser.describe_ir, lambda config: build_backbone(**config)),
    "iresnet18": (recogniser.describe_iresnet, lambda config: build_backbone(**config)),
}


@pytest.mark.parametrize("kind", DESCRIBED)
def test_one_bad_parameter_is_one_complaint(kind):
    """Whichever parameter is missing or of another shape: the network is still recognised, and that one named.

    (Of a width that two parameters show one may be believed that is wrong; the other is named beside it then.)
    """
    describe, build = DESCRIBED[kind]
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in small(kind, fill=False).state_dict().items()}
        config = describe(shapes)[0]
        for name in shapes:
            if name == "empty_context_embedding":
                continue  # without it the file is that of another published network
            for changed in ({}, {name: (1, 1, 1, 1, 1)}):
                damaged = {key: shape for key, shape in shapes.items() if key != name} | changed
                found = describe(damaged)[0]
                if found == config:
                    continue
                own = {key: tuple(tensor.shape) for key, tensor in build(found).state_dict().items()}
                assert own.keys() == shapes.keys(), name
                complaints = [key for key in own if own[key] != damaged.get(key)]
                assert name in complaints and len(complaints) <= 2, (name, found)


@pytest.mark.parametrize("kind", ["unet_AdaGN", "unet_AddPlusGN", "unet_DiffAE", "unet_unconditional"])
def test_what_shapes_do_not_show_is_asked_for(tmp_path, kind):
    """AdaGN and DiffAE have the same parameters, and without cross-attention the width of a head is nowhere."""
    network = small(kind)
    torch.save({**network.state_dict(), "betas": torch.linspace(0.001, 0.02, 50)}, tmp_path / "unet.pt")
    unseen = "attention_head_channels" if kind in ("unet_AddPlusGN", "unet_unconditional") else "condition_type"
    with pytest.raises(UserError, match=rf"model_cfg_path: not set; .*whose .*{unseen}.* cannot be seen"):
        reload(kind, tmp_path / "unet.pt")
    lines = [f"{key}: {value}" for key, value in UNET_SETTINGS.items() if key != "attention_head_channels"]
    condition = "AdaGN" if kind == "unet_unconditional" else kind.removeprefix("unet_")
    lines += ["_target_: models.diffusion.unet.ConditionalUNet", f"condition_type: {condition}"]
    lines += [f"is_context_conditional: {str(kind != 'unet_unconditional').lower()}", "attention_head_channels: 32"]
    (tmp_path / "model.yaml").write_text("\n".join(lines))
    out = tmp_path / "unet.safetensors"
    assert command(["convert", str(tmp_path / "unet.pt"), str(out), "--model-cfg", str(tmp_path / "model.yaml")]) == 0
    assert torch.equal(run(kind, reload(kind, out)), run(kind, network))


class ModelCheckpoint:
    """Stands for a class of Lightning, which is not installed where such a file is read."""


@pytest.fixture
def lightning(monkeypatch):
    """lightning(state, path): a checkpoint as Lightning writes it, with an object among its callbacks."""
    import sys
    import types

    module = types.ModuleType("pytorch_lightning.callbacks")
    monkeypatch.setattr(ModelCheckpoint, "__module__", module.__name__)
    module.ModelCheckpoint = ModelCheckpoint

    def save(state, path):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pytorch_lightning", types.ModuleType("pytorch_lightning"))
            patch.setitem(sys.modules, module.__name__, module)
            torch.save({"epoch": 3, "callbacks": {ModelCheckpoint: ModelCheckpoint()}, "state_dict": state}, path)

    return save


def latent_diffusion() -> dict[str, Tensor]:
    """What stands in a checkpoint of latent diffusion: three networks, a schedule, an average."""
    halves = {**small("vq_encoder").state_dict(), **small("vq_decoder").state_dict()}
    return {
        **{f"first_stage_model.{name}": tensor for name, tensor in halves.items()},
        "betas": torch.ones(10),
        "sqrt_one_minus_alphas_cumprod": torch.ones(10),
        "posterior_mean_coef1": torch.ones(10),
        "model.diffusion_model.input_blocks.0.0.weight": torch.full((4,), float("nan")),  # nobody's business here
        "model_ema.decay": torch.tensor(0.9999),
        "first_stage_model.loss.discriminator.main.0.weight": torch.ones(4),
    }


@pytest.mark.parametrize("form", ["ckpt", "safetensors"])
def test_the_first_stage_comes_out_of_a_whole_checkpoint(tmp_path, lightning, capsys, form):
    path = tmp_path / f"model.{form}"
    save_safetensors(latent_diffusion(), path, {}) if form == "safetensors" else lightning(latent_diffusion(), path)
    for file in (path, tmp_path / "converted.safetensors"):
        assert torch.equal(run("vq_encoder", load_encoder(file)), run("vq_encoder", small("vq_encoder")))
        assert torch.equal(run("vq_decoder", load_decoder(file)), run("vq_decoder", small("vq_decoder")))
        if file == path:
            assert command(["convert", str(path), str(tmp_path / "converted.safetensors")]) == 0
    assert open_network_file(tmp_path / "converted.safetensors").kind == AUTOENCODER
    assert command(["inspect", str(path)]) == 0
    assert "beside it: betas (1 keys), loss (1 keys), model (1 keys), model_ema (1 keys)" in capsys.readouterr().out
    for surplus in ("first_stage_model.surplus", "surplus"):
        save_safetensors({**latent_diffusion(), surplus: torch.ones(1)}, tmp_path / "more.safetensors", {})
        with pytest.raises(UserError, match=r"1 unexpected \(surplus\)"):
            load_encoder(tmp_path / "more.safetensors")


def test_adaface_takes_bgr(tmp_path, lightning):
    network = small("ir_18")
    state = {f"model.{name}": tensor for name, tensor in network.state_dict().items()}
    lightning({**state, "head.kernel": torch.ones(24, 5), "head.t": torch.ones(1)}, tmp_path / "adaface.ckpt")
    images = deterministic_tensor("images", (2, 3, 32, 32))
    expected = run("ir_18", network.register_forward_pre_hook(lambda _, args: (args[0].flip(1),)) and network)
    assert command(["convert", str(tmp_path / "adaface.ckpt"), str(tmp_path / "adaface.safetensors")]) == 0
    assert read_metadata(tmp_path / "adaface.safetensors")["channel_order"] == "BGR"
    for name in ("adaface.ckpt", "adaface.safetensors"):
        loaded = load_backbone(tmp_path / name)
        assert isinstance(loaded, InputAdapter) and (loaded.input_size, loaded.num_features) == (32, 24)
        with torch.no_grad():
            assert torch.equal(loaded(images), expected)
    lightning({**state, "tail.kernel": torch.ones(2)}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"1 unexpected \(tail\.kernel\); the file looks like an IR-18 recogniser"):
        load_backbone(tmp_path / "other.ckpt")


def test_a_run_converts_to_its_average(tmp_path):
    unet = small("unet_ca")
    config = {"_target_": "models.diffusion.unet.ConditionalUNet", **UNET_SETTINGS, "learn_empty_context": True}
    schedule = {"_target_": "diffusion.schedule.NoiseSchedule", "num_timesteps": 40}
    record = {
        "kind": "diffusion",
        "step": 12,
        "model": {name: 2 * tensor for name, tensor in unet.state_dict().items()},
        "ema": unet.state_dict(),
        "config": {"model": config, "diffusion": schedule, "latent_diffusion": False},
        "latent_scale": 1.0,
        "latent_shape": [3, 16, 16],
        "context_scale": 4.0,
    }
    torch.save(record, tmp_path / "step.ckpt")
    assert command(["convert", str(tmp_path / "step.ckpt"), str(tmp_path / "unet.safetensors")]) == 0
    own, converted = (
        load_generator(CheckpointChoice(str(tmp_path / name)), None) for name in ("step.ckpt", "unet.safetensors")
    )
    for field in ("weights_sha256", "latent_shape", "context_scale", "step", "is_published"):
        assert getattr(own, field) == getattr(converted, field), field
    with pytest.raises(UserError, match=r"a training checkpoint of main\.py, not a file of one network"):
        open_network_file(tmp_path / "step.ckpt")


@pytest.mark.parametrize("kind", ["unet_ca", "vq_encoder", "vq_decoder", "ir_18", "iresnet18"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "of another shape"])
def test_a_single_change_is_refused(tmp_path, kind, change):
    state = {f"module.{name}": tensor for name, tensor in small(kind, fill=False).state_dict().items()}
    state |= {f"module.{name}": torch.linspace(0.1, 0.2, 5) for name in SCHEDULE_BUFFERS if kind == "unet_ca"}
    key = list(state)[20]
    if change == "missing":
        del state[key]
    elif change == "unexpected":
        key = "module.surplus"
        state[key] = torch.ones(1)
    else:
        state[key] = torch.ones(3, 2, 1)
    torch.save(state, tmp_path / "file.pt")
    pattern = rf": 1 {change} \({re.escape(key.removeprefix('module.'))}[^;]*\); the file looks like an? "
    with pytest.raises(UserError, match=pattern):
        reload(kind, tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("kind", "loader", "wanted"),
    [
        ("vq_encoder", load_decoder, "looks like a VQ encoder .*, a VQ decoder is wanted"),
        ("unet_ca", load_encoder, "looks like a UNet of 32-64 channels .*, a VQ encoder is wanted"),
        ("ir_18", load_decoder, "looks like an IR-18 recogniser .*, a VQ decoder is wanted"),
        ("unet_ca", load_backbone, "looks like a UNet .*, a recognition backbone is wanted"),
    ],
)
def test_other_networks_are_named(tmp_path, kind, loader, wanted):
    torch.save(small(kind).state_dict(), tmp_path / "file.pt")
    with pytest.raises(UserError, match=wanted):
        loader(tmp_path / "file.pt")


def test_unreadable_weights_are_one_line(tmp_path, capsys):
    state = small("iresnet18").state_dict()
    files = {
        "nan": ({**state, "bn1.weight": state["bn1.weight"] * float("nan")}, r"not finite \(bn1\.weight\)"),
        "type": ({**state, "bn1.weight": torch.ones(16, dtype=torch.int32)}, r"1 of another type \(bn1\.weight"),
        "two": ({**state, **{f"module.{name}": t for name, t in state.items()}}, "unexpected"),
        "unknown": ({"a": torch.ones(1)}, "the keys of no network that is known here"),
        "units": ({**state, "layer1.2.a": torch.ones(1), "layer1.2.b": torch.ones(1)}, "a depth that is not known"),
    }
    for name, (content, message) in files.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(UserError, match=message):
            load_backbone(tmp_path / name)
    for words in (["inspect", str(tmp_path / "nan")], ["inspect", str(tmp_path / "absent")]):
        assert command(words) == 2
    assert command(["convert", str(tmp_path / "nan"), str(tmp_path / "out.pt")]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3 and all(line.startswith("error: ") for line in errors)


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.system, ("touch pwned",), r"(posix|nt)\.system"),
        (eval, ("open('pwned', 'w')",), r"(builtins|__builtin__)\.eval"),
        (__import__("numpy").load, ("pwned.npy", None, True), r"numpy.*load"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"state_dict": value}])
def test_nothing_in_a_file_of_weights_runs(tmp_path, monkeypatch, capsys, function, arguments, name, wrap):
    monkeypatch.chdir(tmp_path)
    content = wrap({"bias": Call(function, *arguments), "weight": torch.ones(1)})
    torch.save(content, "archive.pt")
    Path("plain.pt").write_bytes(pickle.dumps(content, protocol=2))
    for file in ("archive.pt", "plain.pt"):
        loaders = [load_encoder, load_decoder, load_backbone, open_network_file]
        loaders.append(lambda path: load_generator(CheckpointChoice(path), None))
        for loader in loaders:
            with pytest.raises(UserError, match=rf"refused: the pickle wants to call {name}"):
                loader(file)
        with pytest.raises(UserError, match="not a readable checkpoint"):
            load_torch(file)
        assert command(["inspect", file]) == command(["convert", file, "out.safetensors"]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive.pt", "plain.pt"]


def test_a_compressed_archive_is_refused(tmp_path):
    import zipfile

    torch.save({"weight": torch.zeros(100_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in plain.namelist():
            bomb.writestr(member, plain.read(member))
    with pytest.raises(UserError, match=r"bomb\.pt: a torch archive with compressed parts"):
        open_network_file(tmp_path / "bomb.pt")
