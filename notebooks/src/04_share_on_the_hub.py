# %% [markdown]
# # 4. Share on the Hub
#
# **What:** push a checkpoint to the Hugging Face Hub, with a model card. **Why:** there it is safe when the machine goes
# away, and others can use it if you let them. **You will see:** what will be uploaded, the card, and in the end the link.
#
# Log in below with an access token of the role *write*; it is kept by `huggingface_hub`, never in this notebook.

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
# ## Push
#
# Give the repository as `your-name/model-name`. *Preview* shows the files and the card and uploads nothing. If the connection
# breaks, press *Push to the Hub* again: it continues where it stopped.

# %%
edk.panels.share(PROJECT)
