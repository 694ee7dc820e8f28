"""Stand-ins for optional packages of a host, each with the error that the real one raises on some image.

A folder of them goes first on PYTHONPATH, so that they hide what is installed. Each has metadata, because libraries decide by the
version whether to import a package.
"""

from pathlib import Path

BROKEN = {
    # peft from 0.18.1 on refuses a torchao older than 0.16, for plain LoRA too; Colab has 0.10.
    "torchao": ("0.10.0", ""),
    # a build for another numpy
    "tensorflow": ("2.20.0", "raise AttributeError('_ARRAY_API not found')"),
    # a build for another torch
    "torchvision": ("0.26.0", "raise RuntimeError('operator torchvision::nms does not exist')"),
    "xformers": ("0.0.32", "raise ImportError('libcudart.so.12: cannot open shared object file')"),
    "flash_attn": ("2.8.0", "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2')"),
    # asks the Hub while it is imported
    "kernels": ("0.10.0", "raise ConnectionError('HTTPSConnectionPool(host=huggingface.co): Max retries exceeded')"),
    # no library for the CUDA that is there
    "bitsandbytes": ("0.50.2", "raise RuntimeError('CUDA Setup failed despite GPU being available.')"),
    "gptqmodel": ("1.0.0", "raise ImportError('gptqmodel_cuda')"),
    "hqq": ("0.2.0", "raise ImportError('hqq_aten')"),
    "wandb": ("0.28.1", "raise ImportError('cannot import name Imports from wandb.proto')"),
    "jax": ("0.7.2", "raise RuntimeError('This version of jaxlib was built using AVX instructions')"),
}
"""Package -> (version, what its `__init__` does)."""


def write_broken_packages(folder: Path, names: list[str]) -> Path:
    """Write stand-ins for these packages. Returns the folder that continues PYTHONPATH."""
    for name in names:
        version, program = BROKEN[name]
        package = folder / name
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"__version__ = {version!r}\n{program}\n", encoding="utf-8")
        information = folder / f"{name}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", encoding="utf-8"
        )
    return folder
