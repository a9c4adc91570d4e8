"""Attention maps of a text as a page, as a picture and in the terminal: `bigmodel-kernels attention-map`.

`compute` runs the model once; `html`, `png` and `terminal` each show what it returns.
"""
