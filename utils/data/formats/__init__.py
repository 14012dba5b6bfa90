"""Data sets in the formats of the field: readers that give encoded images by number, writers, and a check.

`recognise.open_labelled` opens any of them; `writers.write_labelled` writes; `check.check_images` looks for what would
spoil a training run. On the command line: `python -m utils.data validate` and `convert`.
"""
