"""The people of a generated data set: a name and a context each.

Legend: n identities, D context width.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.diffusion.unet import ConditionalUNet
from utils.config import UserError
from utils.contexts import NUMBERED, read_contexts, rows_digest, uniform_contexts


@dataclass
class Identities:
    """Who is drawn. The digest covers the whole source, so that drawing more people from it does not change it."""

    names: list[str]
    contexts: Tensor | None  # (n, D) float32 unit rows, (n,) long class numbers, or None for an unconditional model
    sha256: str
    neighbours: Tensor | None = None  # (N, D) all contexts of the source, the n drawn ones first; None: no vectors
    depends_on_number: bool = False  # whether another n means other neighbours

    def __post_init__(self) -> None:
        self._rows = {name: row for row, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.names)

    def contexts_of(self, names: Sequence[str]) -> Tensor | None:
        """The contexts of these people, (B, D) or (B,); None for an unconditional model."""
        return None if self.contexts is None else self.contexts[[self._rows[name] for name in names]]


def load_identities(unet: ConditionalUNet, contexts_file: str | None, n_contexts: int | None, seed: int) -> Identities:
    """Read the first `n_contexts` people (None: all) of `contexts_file`, or draw uniform contexts from `seed`.

    Uniform contexts are normalised Gaussian vectors (IDiff-Face, ICCV 2023). An unconditional model and
    one with classes need no contexts. Raises UserError where file, number and model do not fit together.
    """
    needs_vectors = unet.is_context_conditional and unet.n_context_classes == 0
    if contexts_file is not None:
        if not needs_vectors:
            kind = "classes" if unet.is_context_conditional else "no context"
            raise UserError(f"sampling.contexts_file: {contexts_file}, but the model takes {kind}; leave it out")
        return _from_file(unet, contexts_file, n_contexts)
    if n_contexts is None:
        raise UserError("sampling.n_contexts: not set; without sampling.contexts_file give the number of identities")
    if n_contexts < 1:
        raise UserError(f"sampling.n_contexts: {n_contexts}; give at least 1")
    names = [NUMBERED.format(number) for number in range(n_contexts)]
    if needs_vectors:
        if seed < 0:
            raise UserError(f"sampling.seed: {seed}; give 0 or more, from which uniform contexts can be drawn")
        contexts = torch.from_numpy(uniform_contexts(n_contexts, unet.context_input_channels, seed))
        return Identities(names, contexts, f"uniform, seed {seed}", contexts, depends_on_number=True)
    if not unet.is_context_conditional:
        return Identities(names, None, "unconditional")
    if n_contexts > unet.n_context_classes:
        raise UserError(f"sampling.n_contexts: {n_contexts}, but the model knows {unet.n_context_classes} classes")
    return Identities(names, torch.arange(n_contexts), "classes")


def _from_file(unet: ConditionalUNet, contexts_file: str, n_contexts: int | None) -> Identities:
    if not Path(contexts_file).expanduser().exists():
        raise UserError(
            f"sampling.contexts_file: no such file or folder: {contexts_file}; encode.py writes contexts.npy"
        )
    names, contexts = read_contexts(Path(contexts_file).expanduser())
    width = contexts.shape[1]
    if width != unet.context_input_channels:
        raise UserError(
            f"sampling.contexts_file: {contexts_file} holds contexts {width} wide; this model takes contexts "
            f"{unet.context_input_channels} wide, from the recogniser that it was trained with"
        )
    if n_contexts is not None and not 1 <= n_contexts <= len(names):
        raise UserError(f"sampling.n_contexts: {n_contexts}; {contexts_file} holds {len(names)} contexts")
    names = [_folder_name(name, contexts_file) for name in names]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise UserError(f"sampling.contexts_file: {contexts_file} names {len(repeated)} people twice ({repeated[0]})")
    digest = rows_digest(names, contexts)
    neighbours = torch.from_numpy(contexts)
    return Identities(names[:n_contexts], neighbours[:n_contexts], digest, neighbours)


def _folder_name(name: str, contexts_file: str) -> str:
    """A name that can be a folder's; names of people may be paths of images."""
    folder = name.replace("/", "_").replace("\\", "_").strip()
    if not folder or folder.startswith("."):
        raise UserError(f"sampling.contexts_file: {contexts_file} has an identity named {name!r}; a folder cannot be")
    return folder
