# The image for launch/kubernetes.yaml: this repository in /s2s_jax, with all dependencies.
#   docker build -t s2s-jax .                                   # for CPUs
#   docker build -t s2s-jax --build-arg EXTRA=cuda13 .          # for NVIDIA GPUs; cuda12 for older drivers
#   docker run --rm -v /path/to/log:/data s2s-jax inspect /data
ARG PYTHON=3.13
FROM python:${PYTHON}-slim
ARG PYTHON
ARG EXTRA=

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
WORKDIR /s2s_jax

# Dependencies change less often than the code, so they get a layer of their own.
COPY pyproject.toml README.md ./
COPY constraints constraints
COPY s2s_jax/version.py s2s_jax/version.py
COPY s2s_serve/__init__.py s2s_serve/__init__.py
RUN python -m pip install \
      --constraint "constraints/known-good-py$(echo "$PYTHON" | tr -d .).txt" \
      --editable ".[convert${EXTRA:+,$EXTRA}]"

COPY . .
# Users without write permission here could not cache the compiled files.
RUN python -m compileall -q s2s_jax s2s_serve

ENTRYPOINT ["python", "-m", "s2s_jax"]
CMD ["--help"]
