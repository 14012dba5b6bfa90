"""Classification heads for training a recogniser: from embeddings and labels to the logits of the cross-entropy.

All share one interface, `CosineHead`, which also says what a classifier that is sharded over processes calls.
"""

from recognition.heads.adaptive import AdaFace, CurricularFace
from recognition.heads.base import CosineHead, embedding_norms
from recognition.heads.elastic import ElasticFaceArc, ElasticFaceCos
from recognition.heads.fixed import ArcFace, CosFace, NormFace, Softmax

__all__ = [
    "AdaFace",
    "ArcFace",
    "CosFace",
    "CosineHead",
    "CurricularFace",
    "ElasticFaceArc",
    "ElasticFaceCos",
    "NormFace",
    "Softmax",
    "embedding_norms",
]
