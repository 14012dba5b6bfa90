"""The identity context: projection, partial dropout and the empty context, in one place.

Legend: B batch, D context width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from utils.config import UserError


@dataclass
class PreparedContext:
    """Everything about B contexts that does not depend on x_t and t, so that a trajectory computes it once.

    embedding: (B, D), None in an unconditional network. keys_values: for every cross-attention block, in order of
    execution, the keys and values of the context's tokens, (B, heads, tokens, head width) each.
    """

    embedding: Tensor | None
    keys_values: list[tuple[Tensor, Tensor]]

    @classmethod
    def stack(cls, contexts: Sequence["PreparedContext"]) -> "PreparedContext":
        """The rows of all of them, one behind the other."""
        layers = zip(*(context.keys_values for context in contexts), strict=True)
        keys_values = [tuple(torch.cat(parts) for parts in zip(*layer, strict=True)) for layer in layers]
        embeddings = [context.embedding for context in contexts]
        return cls(None if embeddings[0] is None else torch.cat(embeddings), keys_values)


class ContextEmbedder(nn.Module):
    """Turns identity contexts into embeddings of width D and is the one owner of the empty context.

    A base class of the network rather than a part of it, so that the parameters keep their published names at the top
    of the state dict: `context_emb.*` and, where it is learnt, `empty_context_embedding`.

    Training draws two kinds of dropout: contextual partial dropout (CPD; Boutros et al., IDiff-Face, ICCV 2023) zeroes
    single components of an embedding, and classifier-free guidance (Ho & Salimans, 2022) replaces a whole embedding by
    the empty one.
    """

    def __init__(
        self,
        *,
        input_channels: int,
        channels: int,
        n_classes: int,
        is_conditional: bool,
        learn_empty: bool,
        dropout_probability: float,
        unconditioned_probability: float,
    ) -> None:
        """`n_classes` > 0: contexts are class numbers; 0: vectors of width `input_channels`.

        `learn_empty` False: the empty embedding is zero. Not `is_conditional`: no parameters, every context is refused.
        """
        super().__init__()
        for key, value in (
            ("context_dropout_probability", dropout_probability),
            ("unconditioned_probability", unconditioned_probability),
        ):
            if not 0 <= value <= 1:
                raise UserError(f"{key}: {value} is no probability; give a number from 0 to 1")
        if dropout_probability == 1:
            raise UserError("context_dropout_probability: 1 leaves nothing of any context; give a number below 1")
        if is_conditional and channels < 1:
            raise UserError(f"context_channels: {channels}; a conditional network needs at least 1")
        if is_conditional and n_classes < 0:
            raise UserError(f"n_context_classes: {n_classes}; give 0 for context vectors or the number of classes")
        self.context_input_channels = input_channels
        self.context_channels = channels
        self.n_context_classes = n_classes
        self.is_context_conditional = is_conditional
        self.context_dropout_probability = dropout_probability
        self.unconditioned_probability = unconditioned_probability
        if not is_conditional:
            return
        if learn_empty:
            self.empty_context_embedding = nn.Parameter(torch.randn(channels))
        else:
            self.register_buffer("empty_context_embedding", torch.zeros(channels), persistent=False)
        self.context_emb = nn.Embedding(n_classes, channels) if n_classes else nn.Linear(input_channels, channels)

    def embed_context(
        self,
        context: Tensor | None,
        batch_size: int,
        *,
        empty_mask: Tensor | None = None,
        element_mask: Tensor | None = None,
    ) -> Tensor | None:
        """Embed `context`, (B, context_input_channels) or (B,) class numbers; None stands for B empty contexts.

        empty_mask (B,) bool: these samples get the empty context. element_mask (B, D) bool: components that survive
        partial dropout. In training a mask that is not given is drawn; in evaluation nothing is dropped unless a mask
        says so.

        Returns (B, D), or None from a network without conditioning. Raises ValueError for a context of the wrong shape.
        """
        if not self.is_context_conditional:
            if context is not None:
                raise ValueError("context: this network is unconditional (is_context_conditional: false); give None")
            return None
        if context is None:
            return self.empty_context_embedding.expand(batch_size, -1)
        self._check_context(context, batch_size)
        embedding = self.context_emb(context)  # (B, D)

        if element_mask is None and self.training and self.context_dropout_probability > 0:
            element_mask = torch.rand(embedding.shape, device=embedding.device) >= self.context_dropout_probability
        if element_mask is not None:
            embedding = embedding * element_mask / (1 - self.context_dropout_probability)  # survivors keep the mean

        if empty_mask is None and self.training:
            empty_mask = torch.rand(batch_size, device=embedding.device) < self.unconditioned_probability
        if empty_mask is not None:
            # torch.where, not indexing: the empty vector gets a gradient (zero at worst) in every batch, which DDP
            # relies on
            empty = self.empty_context_embedding.to(embedding.dtype)
            embedding = torch.where(empty_mask[:, None], empty, embedding)
        return embedding

    def _check_context(self, context: Tensor, batch_size: int) -> None:
        if self.n_context_classes:
            expected, is_right = f"({batch_size},) integers", context.shape == (batch_size,)
            is_right = is_right and not context.is_floating_point()
        else:
            expected = f"({batch_size}, {self.context_input_channels}) floats"
            is_right = context.shape == (batch_size, self.context_input_channels) and context.is_floating_point()
        if not is_right:
            raise ValueError(f"context: {tuple(context.shape)} of {context.dtype}; this network takes {expected}")
