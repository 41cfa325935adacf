# One image, two builds:
#
#   docker build -t entrgi-server .                                            CUDA (the driver comes from the host)
#   docker build -t entrgi-server:cpu --build-arg VARIANT=cpu --build-arg TORCH_INDEX=URL .
#
# With --build-arg SOURCE_COMMIT=$(git rev-parse HEAD) the server can say which code it runs.
#
# Everything is installed from wheels, at the versions of requirements-otel.lock: those of requirements.lock, and what
# traces need. torch's wheel on the default index is the CUDA build and brings the CUDA libraries; TORCH_INDEX names an
# index that has torch's CPU wheels. VARIANT=cpu without it works too, with CUDA libraries that nobody uses.
ARG PYTHON_VERSION=3.12
ARG VARIANT=cuda

FROM python:${PYTHON_VERSION}-slim-bookworm AS venv-cuda
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all:
COPY requirements-otel.lock /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
    && /opt/venv/bin/pip install -r /build/requirements-otel.lock \
    && /opt/venv/bin/pip check

FROM python:${PYTHON_VERSION}-slim-bookworm AS venv-cpu
ARG TORCH_INDEX=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ONLY_BINARY=:all:
COPY requirements-otel.lock /build/
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/venv \
    && /opt/venv/bin/pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r /build/requirements-otel.lock \
    && /opt/venv/bin/pip check

# hadolint ignore=DL3006
FROM venv-${VARIANT} AS venv

FROM python:${PYTHON_VERSION}-slim-bookworm AS server
# Kernels are compiled on first use (Triton's launchers, the C++ path of the CPU), which takes a compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home entrgi \
    && install -d -o entrgi -g entrgi /models /home/entrgi/.cache /home/entrgi/.cache/huggingface
COPY --from=venv /opt/venv /opt/venv
WORKDIR /app
COPY deploy/healthcheck.py deploy/
COPY kernels kernels/
COPY clients clients/
COPY server server/
COPY demo/__init__.py demo/
COPY demo/models demo/models/
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/home/entrgi/.cache/huggingface \
    XDG_CACHE_HOME=/home/entrgi/.cache \
    TRITON_CACHE_DIR=/home/entrgi/.cache/triton \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    ENTRGI_HOST=0.0.0.0 \
    ENTRGI_PORT=8000
# What /version and the metric build_info name; the image holds no repository to ask.
ARG SOURCE_COMMIT=""
ENV SOURCE_COMMIT=$SOURCE_COMMIT
USER 10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# /health is 200 while models load (/ready is not): only a process that must be restarted fails it.
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["python", "deploy/healthcheck.py"]
CMD ["python", "-m", "server"]
