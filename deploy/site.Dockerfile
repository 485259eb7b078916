# A hospital's site. Build from the repository's root:
#
#   docker build -f deploy/site.Dockerfile -t fedward-site .
#
# PyTorch comes from pip's default index unless TORCH_INDEX names another one, for builds without CUDA
# or for the CUDA version of the site's driver; PyTorch's installation page lists them:
#
#   docker build -f deploy/site.Dockerfile --build-arg TORCH_INDEX=ADDRESS -t fedward-site .
#
# A tag can be moved to another image. A release must pin the digest as well:
#   --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=""
WORKDIR /src
RUN python -m venv /opt/fedward
COPY deploy/constraints.txt ./
# First and alone: another index need not have anything but PyTorch. Later steps find it installed.
RUN /opt/fedward/bin/pip install --no-cache-dir --quiet --disable-pip-version-check \
      ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)"
# Dependencies before sources, so that a change to the sources does not install them again.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
    && /opt/fedward/bin/pip install --no-cache-dir --quiet --disable-pip-version-check \
      --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY common common
COPY client client
COPY server server
RUN pip wheel --no-cache-dir --quiet --disable-pip-version-check --no-deps --wheel-dir /wheels . \
    && /opt/fedward/bin/pip install --no-cache-dir --quiet --disable-pip-version-check --no-deps /wheels/*.whl \
    && /opt/fedward/bin/pip check \
    && /opt/fedward/bin/pip uninstall --yes --quiet uv pip

FROM ${PYTHON_IMAGE}
LABEL org.opencontainers.image.title="fedward-site" \
      org.opencontainers.image.description="Federated learning across hospitals: the hospital's side" \
      org.opencontainers.image.licenses="Apache-2.0"
# tini reaps what the daemon leaves behind and passes signals on. No package installer stays: not pip, not uv
# (above), which Flower would start to install what a pushed app asks for.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.* \
    && rm -rf /var/lib/apt/lists/* \
    && python -m pip uninstall --yes --quiet --root-user-action=ignore pip setuptools wheel \
    && groupadd --gid 10001 fedward \
    && useradd --uid 10001 --gid 10001 --no-log-init --no-create-home --home-dir /tmp \
       --shell /usr/sbin/nologin fedward \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/fedward-site /var/lib/fedward-site/identity
# Owned by root: the site cannot change its own code. pip has compiled it, so PYTHONDONTWRITEBYTECODE
# costs no start-up time.
COPY --from=build /opt/fedward /opt/fedward
ENV PATH=/opt/fedward/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    FEDWARD_SITE_HOME=/var/lib/fedward-site \
    FLWR_HOME=/tmp/flwr \
    FLWR_TELEMETRY_ENABLED=0 \
    FLWR_DISABLE_UPDATE_CHECK=1 \
    FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1
USER 10001:10001
WORKDIR /var/lib/fedward-site
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python", "-m", "fedward_client.health"]
ENTRYPOINT ["/usr/bin/tini", "--"]
CMD ["fedward-site", "run", "--home", "/var/lib/fedward-site"]
