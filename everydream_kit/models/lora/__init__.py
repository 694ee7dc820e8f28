"""Low-rank adapters (LoRA, DoRA, LoHa, LoKr): their forms, their layers in a model, and their files, of every tool.

`forms` says what each is made of, `injection` puts them into a model, `files` writes and merges them, `reading` reads what other
tools wrote: `layer_names` finds the layers, `weight_changes` has the arithmetic.
"""
