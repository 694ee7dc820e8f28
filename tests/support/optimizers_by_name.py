"""One optimizer by its name, as a part of a run has it."""

from everydream_kit.training.optimizers import make_builder


def build_optimizer(name, param_groups, *, lr, betas=None, eps=None, weight_decay=None, device_type="cpu", **arguments):
    """An optimizer of parameters or groups; arguments are those of its class."""
    common = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    groups = [{**common, **(group if isinstance(group, dict) else {"params": [group]})} for group in param_groups]
    return make_builder(name, groups, device_type, arguments)(groups)
