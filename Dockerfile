# syntax=docker/dockerfile:1
# rlhf_exp in a container; one argument chooses processors only, or CUDA:
#
#   docker build -t rlhf-exp .
#   docker build -t rlhf-exp:cuda --build-arg ACCELERATOR=cuda .
#
# docs/how-to/container.md says how to run it, also by Apptainer on a cluster.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS build
ARG ACCELERATOR=cpu
# Where a torch without CUDA is; the one of Python's index brings CUDA's libraries.
ARG CPU_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=annotate,deepspeed,lora,serve,slurm,sweeps
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_COMPILE=1
ENV PATH=/opt/rlhf-exp/bin:$PATH
RUN python -m venv /opt/rlhf-exp
WORKDIR /src
COPY constraints.txt ./
RUN case "$ACCELERATOR" in \
      cpu) pip install --index-url "$CPU_INDEX" -c constraints.txt torch ;; \
      cuda) pip install -c constraints.txt torch ;; \
      *) echo "ACCELERATOR=$ACCELERATOR: expected cpu or cuda" >&2; exit 1 ;; \
    esac
COPY pyproject.toml setup.py README.md LICENSE ./
COPY conf ./conf
COPY hydra_plugins ./hydra_plugins
COPY rlhf_exp ./rlhf_exp
# DeepSpeed's extensions would be compiled while it is installed; nothing here uses them.
RUN DS_BUILD_OPS=0 pip install -c constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON}-slim-bookworm
LABEL org.opencontainers.image.title="rlhf_exp" \
      org.opencontainers.image.description="RLHF experiments: SFT, reward model, PPO, evaluation" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/rlhf-exp /opt/rlhf-exp
# Any user may run it (--user, Apptainer), also one without an entry in /etc/passwd: HOME and USER
# stand for that. /work is where commands start: outputs/, and a conf/ of one's own.
ENV PATH=/opt/rlhf-exp/bin:$PATH \
    HOME=/cache/home \
    USER=rlhf \
    HF_HOME=/cache/huggingface \
    XDG_CACHE_HOME=/cache
RUN install -d -m 1777 /work /cache /cache/home
USER 1000:1000
WORKDIR /work
VOLUME ["/work", "/cache"]
ENTRYPOINT ["rlhf-exp"]
CMD ["--help"]
