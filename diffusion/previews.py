"""A look at a model in training: what it draws without an identity, for a few fixed identities, and for new ones."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from diffusion.first_stage import FirstStage
from diffusion.samplers import sample_ddim
from diffusion.schedule import NoiseSchedule
from utils import distributed
from utils.contexts import uniform_contexts
from utils.data.face_dataset import FaceDataset
from utils.images import centre_square, grid, read_image, resize, to_uint8

IDENTITIES = 5
NEW_IDENTITIES = 2
COLUMNS = 8
NUM_STEPS = 25


def draw_preview(
    unet: nn.Module,
    schedule: NoiseSchedule,
    dataset: FaceDataset,
    first_stage: FirstStage,
    latent_shape: Sequence[int],
    context_scale: float,
    seed: int,
) -> np.ndarray:
    """A grid, uint8 (H, W, 3), a row each: the empty context; people of the data set, the image of the context first;
    people who do not exist (uniform contexts).

    Drawn with DDIM from the same noise and for the same contexts each time, so that previews can be compared.
    `latent_shape` is (C, h, w). An unconditional model gets the first row only.
    """
    device = next(unet.parameters()).device
    generator = torch.Generator().manual_seed(distributed.seed_for(seed, "preview"))
    noise = torch.randn((COLUMNS, *latent_shape), generator=generator).to(device)  # x_T (COLUMNS, C, h, w)

    def draw(context: torch.Tensor | None) -> np.ndarray:
        with torch.inference_mode():
            x_0 = sample_ddim(unet, noise, context, schedule, num_steps=NUM_STEPS)
            return to_uint8(first_stage.decode(x_0))  # latents => uint8 (COLUMNS, H, W, 3)

    rows = [draw(None)]
    if unet.is_context_conditional:
        for index in np.random.default_rng(seed).permutation(len(dataset))[:IDENTITIES]:
            context = (dataset.embeddings[index] * context_scale).to(device).expand(COLUMNS, -1)
            drawn = draw(context)
            drawn[0] = resize(centre_square(read_image(dataset.root / dataset.names[index])), drawn.shape[1])
            rows.append(drawn)
        new = uniform_contexts(NEW_IDENTITIES, dataset.embeddings.shape[1], seed)  # (NEW_IDENTITIES, D)
        for context in torch.from_numpy(new) * context_scale:
            rows.append(draw(context.to(device).expand(COLUMNS, -1)))
    return grid(np.concatenate(rows), COLUMNS)
