# %% [markdown]
# # 3. Compare and export
#
# **What:** generate the same prompts with several checkpoints, pick the best one, write it as one file for your image app.
# **Why:** the last checkpoint is not always the best. **You will see:** before and after, side by side, and a file.

# %% [setup]

# %% [markdown]
# ## Your project
#
# Every notebook with the same project name works on the same folder. The list says what this machine can do and what to
# fix.

# %% tags=["parameters"]
PROJECT = "jets"  #@param {type:"string"}
MOUNT_DRIVE = False  #@param {type:"boolean"}

import everydream_kit as edk

edk.panels.setup(PROJECT, mount_drive=MOUNT_DRIVE)

# %% [markdown]
# ## Compare
#
# Tick checkpoints, write prompts, press *Generate images*. Seeds are the same everywhere, so only the model differs.
# Then pick the winner. Checkpoints appear as they are saved.

# %%
edk.panels.compare(PROJECT)

# %% [markdown]
# ## Export
#
# *Export* writes one `.safetensors` file that the common image apps load. Its size is said before.

# %%
edk.panels.share(PROJECT)

# %% [markdown]
# More forms, each with `edk.panels.action(PROJECT, name)`: `"merge"` puts a LoRA into a model or mixes two models, `"extract"`
# makes a LoRA of the difference of two models, `"sample"` generates images with any model.

# %% [markdown]
# To share it with others: `04_share_on_the_hub`.
