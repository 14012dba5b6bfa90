"""`dataset.json` and `README.md` of a generated data set: what it is, how it was made, what it may be used for."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from diffusion.layouts import BLOCK_COLUMNS
from diffusion.sample_lines import Record
from utils.checkpoint import write_text

CARD_FILE = "README.md"
_TEMPLATE = Path(__file__).with_name("data_card.md")
_LAYOUTS = {
    "folders": "`<identity>/<index>.{}`",
    "blocks": f"`<identity>.{{}}`: all images of a person, in rows of {BLOCK_COLUMNS} tiles, filled with black",
    "shards": "WebDataset: `faces-<number>.tar` with `<number>.{}`, `.cls` (the label) and `.json` (the name) an image",
}
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_CITATIONS = {
    "TwoStage": """@inproceedings{lin2025uiface,
  title = {{UIFace}: Unleashing Inherent Model Capabilities to Enhance Intra-Class Diversity
           in Synthetic Face Recognition},
  author = {Lin, Xiao and Huang, Yuge and Xu, Jianqing and Mi, Yuxi and Zhou, Shuigeng and Ding, Shouhong},
  booktitle = {International Conference on Learning Representations},
  year = {2025}
}""",
    "": """@inproceedings{boutros2023idiffface,
  title = {{IDiff-Face}: Synthetic-based Face Recognition through Fizzy Identity-Conditioned Diffusion Models},
  author = {Boutros, Fadi and Grebe, Jonas Henry and Kuijper, Arjan and Damer, Naser},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year = {2023}
}""",
}


def describe(lines: Sequence[Record], image_shape: Sequence[int], threshold: float | None) -> dict[str, Any]:
    """The counts of dataset.json from the manifest's lines; image_shape: (H, W, 3); threshold: of the switch."""
    identities = len({line["identity"] for line in lines})
    switches = [line["switch_t"] for line in lines if line["switch_t"] is not None]
    switched = [t for t in switches if t >= 0]
    return {
        "images": len(lines),
        "identities": identities,
        "images_per_identity": len(lines) // identities,
        "image_height": image_shape[0],
        "image_width": image_shape[1],
        "threshold": threshold,
        "switched": len(switched) / len(switches) if switches else None,  # share of the images
        "mean_switch_t": sum(switched) / len(switched) if switched else None,
    }


def write_card(folder: Path, description: Mapping[str, Any]) -> None:
    """Write README.md from the content of dataset.json."""
    settings, source = description["settings"], description["source"]
    image_format, quality = settings["sampling.image_format"], settings["sampling.image_quality"]
    lossless = quality is None and image_format != "jpg"
    layout, bound = settings["sampling.save_mode"], settings["sampling.perturbation.lower_bound"]
    negative = settings["sampling.negative.choice"]
    sampler = {key.partition(".")[2]: value for key, value in settings.items() if key.startswith("sampler.")}
    shown = ", ".join(f"{name} {value}" for name, value in sampler.items() if value is not None)
    switches = ""
    if description["switched"] is not None:
        mean = description["mean_switch_t"]
        switches = "\nThe identity was let in at a fixed timestep, t = {min_t}.".format(**sampler)
    if description["threshold"]:
        switches = (
            f"\nThe identity was let in when the cross-attention maps had settled (threshold "
            f"{description['threshold']:.4g}): in {100 * description['switched']:.1f} % of the images before the end "
            f"of stage 1{'' if mean is None else f', at t = {mean:.0f} on average'}."
        )
    values = {
        "front_matter": "\n".join(_front_matter(description)),
        "title": f"Drawn faces: {description['identities']:,} identities, {description['images']:,} images",
        "images": f"{description['images']:,}",
        "identities": f"{description['identities']:,}",
        "images_per_identity": description["images_per_identity"],
        "width": description["image_width"],
        "height": description["image_height"],
        "format": f"{image_format.upper()}, {'without loss' if lossless else f'quality {quality or 95}'}",
        "layout": _LAYOUTS[layout].format(image_format),
        "angle": "" if bound is None else ", `angle` (radians) between its context and its identity's",
        "more_files": ""
        if not switches
        else "- `attention_change.npz`: how fast the attention maps moved, for each image.\n",
        "checkpoint": settings["checkpoint"],
        "step": f", step {source['step']} of training" if source.get("step") is not None else "",
        "contexts": _contexts(settings["sampling.contexts_file"]),
        "sampler": f"{settings['sampler']} ({shown})",
        "precision": settings["sampling.precision"],
        "compute_batch": settings["sampling.compute_batch"],
        "seed": settings["sampling.seed"],
        "code": ", ".join(str(version or "version unknown") for version in description["code_versions"]),
        "perturbation": ""
        if bound is None
        else f"\nEach has a context of its own, whose cosine with its identity's is {bound} or more (IDperturb).",
        "negative": "" if negative is None else f"\nGuidance led away from another identity ({negative}; NegFaceDiff).",
        "switches": switches,
        "licence": description["licence"] or "None is stated yet; sampling.licence sets it.",
        "citation": "\n\n".join(text for sampler, text in _CITATIONS.items() if sampler in ("", settings["sampler"])),
    }
    write_text(folder / CARD_FILE, Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(values))


def _front_matter(description: Mapping[str, Any]) -> list[str]:
    """The card's head in YAML, as dataset hubs read it."""
    size = next((name for limit, name in _SIZES if description["images"] < limit), "n>1M")
    lines = [f"license: {json.dumps(description['licence'])}"] if description["licence"] else []
    lines += ["tags:", "- face-recognition", "- synthetic", "size_categories:", f"- {size}"]
    if description["settings"]["sampling.save_mode"] == "shards":
        lines += ["configs:", "- config_name: default", '  data_files: "*.tar"']
    return lines


def _contexts(digest: str) -> str:
    """What dataset.json says of the contexts, in words."""
    if digest == "unconditional":
        return "none, the model is unconditional"
    if digest == "classes":
        return "the classes of the model"
    return digest if digest.startswith("uniform") else f"a file whose names and rows have the SHA-256 `{digest}`"
