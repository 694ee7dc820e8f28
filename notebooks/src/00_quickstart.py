# %% [markdown]
# # Quickstart: teach a small model a new look
#
# **What:** the small Stable Diffusion that ships with the kit learns to draw in ink, from 32 captioned drawings.
# **Why:** you see every step of fine-tuning in a few minutes, on any machine, before you rent a GPU.
# **You will see:** the machine checked, samples that change as it learns, and at the end *before* and *after*.
#
# Run the cells from top to bottom (*Run > Run All Cells* works too). Start with the set-up.

# %% [setup]

# %% [markdown]
# ## 1. Where am I?
#
# The list says what this machine can do and what to fix. Everything you make is kept in the project's folder, whose place
# is shown; the other notebooks find it there by the same name.

# %% tags=["parameters"]
PROJECT = "quickstart"  #@param {type:"string"}
MAX_EPOCHS = 40  #@param {type:"integer"}
MOUNT_DRIVE = False  #@param {type:"boolean"}

import everydream_kit as edk

edk.panels.setup(PROJECT, mount_drive=MOUNT_DRIVE)

# %% [markdown]
# ## 2. Train
#
# 32 ink drawings, each with a caption, come with the kit. This starts training on them in a process of its own and shows it
# live: samples first, then the loss. Run the cell again whenever you like: it finds the run, and continues one that was stopped.

# %%
edk.panels.train(PROJECT, demo=True, preset="demo", settings={"max_epochs": MAX_EPOCHS}).run()

# %% [markdown]
# ## 3. Before and after
#
# The same prompts and the same noise, sampled with the base model and with yours, as soon as training has ended.

# %%
edk.panels.compare(PROJECT).run()

# %% [markdown]
# ## 4. The images
#
# What it learned from. Change a caption if you like: it is written at once, and *Undo* takes it back.

# %%
edk.panels.dataset(PROJECT)

# %% [markdown]
# That is all there is to it. With your own images and a full-size base: `01_prepare_dataset`, `02_train`,
# `03_compare_and_export`, `04_share_on_the_hub`.
