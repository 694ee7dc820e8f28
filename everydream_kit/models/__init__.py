"""Models: families, reading and writing them, text and image encoding, sampling, adapters.

`load_model` (loading.py) gives a `Model`; `model.family` (`families/`) knows what is different about it; `encoding.py`
and `sampling.py` work on any. Nothing here knows datasets or training. Importing this package imports nothing heavy.
"""
