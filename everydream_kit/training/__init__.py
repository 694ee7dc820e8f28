"""The trainer: what a step computes, the loop, its state, its listeners, and the runs that are made of them."""
