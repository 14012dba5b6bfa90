"""The paper's ablation as one command: one checkpoint, several samplers, a recogniser trained on the faces of each."""
