"""Face recognition: backbones, margin heads, `python -m recognition.train` and `python -m recognition.test`."""
