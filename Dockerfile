# Builds the production image: the broker alone, without the embedded Postgres. It does not run as root.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# SQL statements are checked against the files in `.sqlx`, so the build needs no database.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --locked --release --no-default-features \
    && cp target/release/token-broker /token-broker

FROM debian:bookworm-slim
# The broker verifies the upstream's certificate with the system's CA certificates.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -m 0700 -o 65532 -g 65532 /var/lib/token-broker
COPY --from=build /token-broker /usr/local/bin/token-broker

# A number, so that Kubernetes can verify that the user is not root (`runAsNonRoot`).
USER 65532:65532
# The audit journal. If this volume is lost, records that Postgres does not have yet are lost.
VOLUME /var/lib/token-broker
ENV TOKEN_BROKER_STATE_DIR=/var/lib/token-broker
EXPOSE 50051 9464
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["token-broker", "health"]
ENTRYPOINT ["token-broker"]
CMD ["serve"]
