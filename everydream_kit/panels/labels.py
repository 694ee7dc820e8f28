"""Readable labels of settings, made from their names; the name itself stands next to each in the form."""

from __future__ import annotations

LABELS = {
    "resume_ckpt": "Base model",
    "data_root": "Dataset folder",
    "training_kind": "What is trained",
    "max_epochs": "Epochs",
    "max_steps": "Most steps",
    "lr": "Learning rate",
    "lr_scheduler": "Learning rate schedule",
    "grad_accum": "Gradient accumulation",
    "cond_dropout": "Caption dropout",
    "flip_p": "Mirror probability",
    "disable_textenc_training": "Freeze the text encoder",
    "disable_unet_training": "Freeze the UNet",
    "disable_amp": "Full precision",
    "logdir": "Folder of the runs",
    "save_ckpt_dir": "Folder of single files",
    "ckpt_every_n_minutes": "Save every … minutes",
    "save_every_n_epochs": "Save every … epochs",
    "sample_steps": "Sample every … steps",
    "keep_last_n": "Keep the last … checkpoints",
    "log_step": "Log every … steps",
    "no_save_ckpt": "Save no checkpoints",
    "no_prepend_last": "Plain names of single files",
    "save_ckpts_from_n_epochs": "Save from epoch … on",
    "attn_type": "Attention",
    "quantization": "Quantize the frozen base",
    "text_quantization": "Quantize the language model",
    "checkpointing_share": "Share of recomputed blocks",
    "blocks_to_swap": "Blocks in host memory",
    "cuda_graphs": "CUDA graphs",
    "lora_form": "Form of the LoRA",
    "lora_dora": "DoRA",
    "eps": "Epsilon",
    "parallel": "Several GPUs",
    "gpuid": "GPU index",
    "ema_sample_ema_model": "Sample with EMA",
    "ema_sample_nonema_model": "Sample without EMA",
    "ema_resume_model": "EMA to resume from",
    "rated_dataset_target_dropout_percent": "Rated dataset: share at the end",
}
"""Where the name's own words would say too little."""

_WORDS = {
    "lr": "learning rate",
    "ckpt": "checkpoint",
    "te": "text encoder",
    "textenc": "text encoder",
    "unet": "UNet",
    "vae": "VAE",
    "ema": "EMA",
    "snr": "SNR",
    "lora": "LoRA",
    "dora": "DoRA",
    "amp": "mixed precision",
    "cfgs": "guidance",
    "wandb": "Weights & Biases",
    "hub": "Hub",
    "n": "…",
    "num": "number of",
    "val": "validation",
    "dir": "folder",
    "grad": "gradient",
    "accum": "accumulation",
    "tf32": "TF32",
    "ddp": "DDP",
}


def label_of(name: str) -> str:
    """`min_snr_gamma` as `Min SNR gamma`."""
    if name in LABELS:
        return LABELS[name]
    text = " ".join(_WORDS.get(word, word) for word in name.split("_"))
    return text[:1].upper() + text[1:]
