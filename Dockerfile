# syntax=docker/dockerfile:1
# The API: the base install, without the training stack. Dockerfile.gpu makes the worker.
# Python's minor version and Debian's release are pinned; a rebuild brings their security fixes.
FROM python:3.12-slim-bookworm

# One uid in both images, for the API and the worker share one volume.
RUN groupadd --gid 10001 tuneyard \
 && useradd --uid 10001 --gid tuneyard --home-dir /data/home --no-create-home --shell /usr/sbin/nologin tuneyard \
 && install --directory --owner=tuneyard --group=tuneyard --mode=0700 /data /data/home

WORKDIR /build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Dependencies first: a change of the code leaves this layer alone.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install --constraint constraints.txt '.[postgres,s3]'
COPY api api
COPY cli cli
COPY shared shared
COPY worker worker
RUN pip install --no-deps --force-reinstall .

# An empty folder: `python -m` looks for modules where it is started.
WORKDIR /srv
ENV HOME=/data/home \
    PYTHONUNBUFFERED=1 \
    TUNEYARD_DATA_DIR=/data \
    TUNEYARD_HOST=0.0.0.0
USER 10001:10001
VOLUME /data
EXPOSE 8765
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8765/healthz', timeout=4)"]
CMD ["tuneyard", "api", "--port", "8765"]
