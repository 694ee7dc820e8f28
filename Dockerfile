# EveryDream Kit for a rented GPU (RunPod, Vast, or any host with NVIDIA's container runtime): JupyterLab and TensorBoard.
#
#   docker build -t everydream-kit .
#   docker run --gpus all --shm-size=2g -e JUPYTER_PASSWORD=... -p 8888:8888 -v "$PWD/workspace:/workspace" everydream-kit
#
# A plain Python image is enough: torch's wheels bring CUDA along, and the host brings the driver.
FROM python:3.12-slim-bookworm

# procps and git for people in the terminal; libgl and compilers are not needed.
RUN apt-get update \
    && apt-get install -y --no-install-recommends bash git procps tini openssh-client \
    && rm -rf /var/lib/apt/lists/*

ENV EDK_VENV=/opt/everydream \
    EDK_TORCH=cuda \
    PATH=/opt/everydream/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/workspace/.cache/huggingface \
    SHELL=/bin/bash

# What the requirements are made of first, so that a change of the code does not install torch again.
WORKDIR /opt/everydream-kit
COPY setup.cfg pyproject.toml README.md LICENSE colab_setup.sh ./
COPY scripts ./scripts
COPY everydream_kit/__init__.py everydream_kit/errors.py everydream_kit/hosts.py ./everydream_kit/
RUN bash colab_setup.sh && /opt/everydream/bin/python -m pip install jupyter-server-proxy

COPY . .
RUN bash colab_setup.sh

VOLUME /workspace
WORKDIR /workspace
EXPOSE 8888 6006
ENTRYPOINT ["tini", "--", "bash", "/opt/everydream-kit/scripts/start_pod.sh"]
