"""The paper's figures for any checkpoint, and those of an evaluation: `python -m utils.plotting`.

Each figure is a function that computes arrays (method_arrays, result_plots) and one that draws arrays (method_plots,
result_plots, roc); `catalogue` names them, with titles and captions.
"""
