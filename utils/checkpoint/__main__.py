"""What is in a file of weights, and the same as safetensors with its configuration.

    python -m utils.checkpoint inspect FILE
    python -m utils.checkpoint convert FILE OUT.safetensors [--model-cfg FILE] [--diffusion-cfg FILE]

Nothing in FILE is executed. A mistake is one line on standard error and exit status 2.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from diffusion.model_file import model_of_network_file, model_of_record, save_model_file
from models.autoencoder.vqgan import load_decoder, load_encoder
from recognition.backbones import backbone_of, save_backbone
from recognition.onnx import OnnxRecogniser
from recognition.provenance import describe_provenance
from utils.checkpoint import read_content, save_safetensors
from utils.config import UserError, check_writable
from utils.embedders import facenet_embedder
from utils.networks import AUTOENCODER, BACKBONE, DECODER, ENCODER, FACENET, RUNS, UNET, NetworkFile, recognise


def inspect(path: Path) -> list[str]:
    """What a file holds, a line each: network, configuration, parameters, dtypes, prefixes, metadata.

    Raises UserError for a missing or damaged file, one that wants to call anything, and unknown networks.
    """
    if path.suffix == ".onnx" and path.is_file():
        graph = OnnxRecogniser(path, input_size=112)
        lines = [
            f"{path}: an ONNX recogniser ({graph.input_size} pixels => {graph.num_features} numbers)",
            f"input: {graph.input_name}, channels {'last' if graph.channels_last else 'first'}, batches of "
            f"{graph.batch or 'any size'}",
        ]
        return [*lines, *(f"{key}: {value}" for key, value in sorted(graph.properties.items()))]
    content, metadata = read_content(path)
    if isinstance(content, dict) and content.get("kind") in RUNS:
        return _describe_run(path, content)
    file = recognise(path, content, metadata)
    lines = [f"{path}: {file.looks_like}", f"kind: {file.kind}", f"configuration: {json.dumps(file.config)}"]
    if file.assumed:
        lines.append(f"not visible in the weights: {json.dumps(file.assumed)} is a guess")
    lines.append(_count(file.state))
    lines.append(
        "prefixes: " + ", ".join(f"{prefix or 'none'} ({count} keys)" for prefix, count in file.prefixes.items())
    )
    if file.betas is not None:
        lines.append(f"betas: {len(file.betas)}, {file.betas[0]:.6g} to {file.betas[-1]:.6g}")
    if file.channel_order is not None:
        lines.append(f"channel order: {file.channel_order}")
    if file.beside:
        lines.append("beside it: " + ", ".join(f"{name} ({count} keys)" for name, count in sorted(file.beside.items())))
    if "provenance" in metadata:
        lines.append(f"trained on: {describe_provenance(metadata['provenance'])}")
    if metadata:
        lines.append(f"metadata: {json.dumps(metadata)}")
    return lines


def convert(
    path: Path, out: Path, *, model_cfg_path: str | None = None, diffusion_cfg_path: str | None = None
) -> NetworkFile:
    """Write the network in `path` as safetensors, with its configuration in the metadata; returns it, read back.

    Strict: every key must fit the network that was recognised. Of a training checkpoint of main.py the average is
    taken. Raises UserError where the file does not fit, or `out` exists or is not named .safetensors.
    """
    if out.suffix != ".safetensors":
        raise UserError(f"{out}: name the converted file .safetensors")
    if out.exists():
        raise UserError(f"{out}: exists; give another name")
    check_writable(out, "OUT")
    if path.suffix == ".onnx":
        raise UserError(
            f"{path}: an ONNX graph is no state dict; encode.py embedder=insightface_onnx takes it as it is"
        )
    content, metadata = read_content(path)
    if isinstance(content, dict) and content.get("kind") == "diffusion":
        save_model_file(model_of_record(path, content), out)
    else:
        file = recognise(path, content, metadata)
        if file.kind != UNET and (model_cfg_path or diffusion_cfg_path):
            raise UserError(f"--model-cfg, --diffusion-cfg: {path} looks like {file.looks_like}, not like a UNet")
        _convert_network(file, out, model_cfg_path, diffusion_cfg_path)
    return recognise(out, *read_content(out))


def _convert_network(file: NetworkFile, out: Path, model_cfg_path: str | None, diffusion_cfg_path: str | None) -> None:
    if file.kind == UNET:
        model = model_of_network_file(file, model_cfg_path=model_cfg_path, diffusion_cfg_path=diffusion_cfg_path)
        save_model_file(model, out)
    elif file.kind == BACKBONE:
        save_backbone(backbone_of(file), out, file.channel_order, provenance=file.metadata.get("provenance"))
    elif file.kind == FACENET:
        save_safetensors(facenet_embedder(str(file.path)).network.network.state_dict(), out, {"kind": FACENET})
    else:
        modules = [load_encoder(file.path)] if file.kind in (ENCODER, AUTOENCODER) else []
        modules += [load_decoder(file.path)] if file.kind in (DECODER, AUTOENCODER) else []
        weights = {name: tensor for module in modules for name, tensor in module.state_dict().items()}
        save_safetensors(weights, out, {"kind": file.kind, **file.config, "latent_scale": modules[0].latent_scale})


def _describe_run(path: Path, content: Mapping[str, Any]) -> list[str]:
    parts = ", ".join(str(name) for name in content)
    lines = [f"{path}: {RUNS[content['kind']]}, step {content.get('step')}", f"parts: {parts}"]
    config = content.get("config", {})
    lines += [f"configuration: {json.dumps(config['model'])}"] if "model" in config else []
    return [*lines, _count(content["model"])]


def _count(state: Mapping[str, torch.Tensor]) -> str:
    tensors: Iterable[torch.Tensor] = state.values()
    dtypes = Counter(str(tensor.dtype).removeprefix("torch.") for tensor in tensors)
    numbers = sum(tensor.numel() for tensor in state.values())
    shown = ", ".join(f"{dtype} ({count})" for dtype, count in dtypes.most_common())
    return f"{len(state)} tensors, {numbers:,} numbers ({numbers / 1e6:.1f} M), {shown}"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m utils.checkpoint", description="Look at or convert a file of weights."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    look = commands.add_parser("inspect", help="say what a file of weights holds")
    look.add_argument("file", type=Path)
    change = commands.add_parser("convert", help="write it as safetensors, with its configuration")
    change.add_argument("file", type=Path)
    change.add_argument("out", type=Path)
    change.add_argument("--model-cfg", help="a file of configs/model, for a UNet whose settings its shapes do not show")
    change.add_argument("--diffusion-cfg", help="a file of configs/diffusion, for a UNet without betas beside it")
    given = parser.parse_args(arguments)
    try:
        if given.command == "inspect":
            lines = inspect(given.file)
        else:
            options = {"model_cfg_path": given.model_cfg, "diffusion_cfg_path": given.diffusion_cfg}
            written = convert(given.file, given.out, **options)
            lines = [f"{given.out}: {written.kind}, {_count(written.state)}"]
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.write("".join(line + "\n" for line in lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
