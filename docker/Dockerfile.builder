# Compiles the kernels into a registry, then exits: no GPU. Build from the checkout's root; compose.yaml does.
FROM python:3.13-slim-bookworm

# The server image has the same user, so that both can write the registry's volume.
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin cubinery \
    && install --directory --owner=cubinery --group=cubinery --mode=0700 /data

WORKDIR /app
COPY pyproject.toml README.md LICENSE ./
COPY registry ./registry
COPY runtime ./runtime
COPY server ./server
COPY kernels ./kernels
COPY builder ./builder
RUN pip install --no-cache-dir -e "./[build]"

USER 10001:10001
VOLUME /data
CMD ["python", "-m", "builder", "--arch", "sm_120", "--registry", "/data/registry.db"]
