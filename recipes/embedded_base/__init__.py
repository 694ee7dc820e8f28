"""The stages of training the embedded base model; `recipes/train_embedded_base.py` runs them in order."""
