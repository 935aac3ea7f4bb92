# syntax=docker/dockerfile:1.7
# Flotilla's one image: the `flotilla` binary and the default embedding model. The role (producer, worker,
# migrate) is the command. Build: docker build -t flotilla:0.1.0 .

# The model is fetched in its own stage, so that a change of code never downloads it again.
FROM python:3.11-slim-bookworm AS model
COPY scripts/fetch_model.py /src/fetch_model.py
RUN --mount=type=cache,target=/cache \
    mkdir -p /models && FLOTILLA_CACHE=/cache python3 /src/fetch_model.py /models/all-MiniLM-L6-v2

# Not the slim one: it has no make, which the allocator's build wants.
FROM rust:1.95-bookworm AS build
WORKDIR /src
# What may enter the context is listed in .dockerignore; rust-toolchain.toml is not, because this image is the toolchain.
COPY . .
# The cache mounts keep crates and object files between builds; the binary is copied out because a mount
# does not belong to the layer.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,sharing=locked \
    cargo build --profile dist --locked -p cli --bin flotilla \
    && install -D -m 0755 target/dist/flotilla /out/flotilla

FROM debian:bookworm-slim AS runtime
# CA certificates come with the build image: TLS to an embedding endpoint needs them, nothing else does.
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=model /models /models
COPY --from=build /out/flotilla /usr/local/bin/flotilla
RUN groupadd --gid 10001 flotilla \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin flotilla
ENV FLOTILLA_MODEL_DIR=/models/all-MiniLM-L6-v2
# A number, so that Kubernetes can verify runAsNonRoot.
USER 10001:10001
# SIGTERM starts the drain; the process is PID 1 and handles it itself.
STOPSIGNAL SIGTERM
EXPOSE 8080 9090
ENTRYPOINT ["/usr/local/bin/flotilla"]
CMD ["--help"]
