# %% [markdown]
# # 2. Train
#
# **What:** choose settings, start, watch, stop, resume. **Why:** training runs in a process of its own, so you can close this
# tab and come back. **You will see:** how many steps it will be before you start, then loss, samples and speed as they come.

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
# ## Settings and progress
#
# *Start from* fills the form with a sensible beginning for a style, a person, a big dataset or a small GPU. Each field says
# what it does and which values are valid; errors show next to the field. *Start training* works as soon as nothing is.

# %%
edk.panels.train(PROJECT)

# %% [markdown]
# ## Keep this notebook awake (Colab)
#
# Colab ends sessions in which nothing runs. There, this cell runs until training ends, and other buttons answer when it has
# ended; interrupting it does not stop the training. Elsewhere it does nothing.

# %%
edk.panels.train(PROJECT).keep_awake()

# %% [markdown]
# Finished? Continue with `03_compare_and_export`.
