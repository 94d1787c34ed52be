# LoRAM with the versions that it is tested with. By default torch is PyPI's build, which has CUDA in it:
#   docker build --tag loram .
# For machines without a GPU, take the build for CPUs, which is much smaller:
#   docker build --tag loram:cpu --build-arg TORCH_INDEX=ADDRESS .
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG TORCH_INDEX=

# Models, data and results are in the folder that the user mounts, and so are the caches below the home folder.
RUN useradd --uid 1000 --home-dir /work --create-home loram
WORKDIR /opt/loram
COPY constraints.txt ./
# torch has a layer of its own, so that a change of LoRAM does not fetch it again; X.Y+cpu counts as newer than X.Y
RUN pip install --no-cache-dir --constraint constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} torch
COPY pyproject.toml README.md LICENSE ./
COPY loram loram
RUN pip install --no-cache-dir --constraint constraints.txt '.[gguf]'

USER 1000
ENV HOME=/work
WORKDIR /work
ENTRYPOINT ["loram"]
CMD ["--help"]
