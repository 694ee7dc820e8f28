# %% [markdown]
# # 1. Prepare a dataset
#
# **What:** bring your images and captions into the project, look through them, fix them.
# **Why:** what the model learns is what the captions say about the images; an hour here is worth more than a day of
# training. **You will see:** a gallery with captions to edit, the buckets, and what is wrong with which file.

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
# ## Images and captions
#
# *Add images*: drop images, `.txt` captions or a `.zip`, or name a folder or a Hub dataset. *Images*: edit captions in
# place, search, add or remove tags for a selection. *Report*: buckets and tags. *Problems*: what cannot be used, and why.
# Everything is written at once, and *Undo* takes it back.

# %%
edk.panels.dataset(PROJECT)

# %% [markdown]
# Done? Continue with `02_train`.
