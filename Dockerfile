# The production image: the broker alone, without a Postgres of its own and without root.

FROM rust:1.95-bookworm AS build
WORKDIR /src
COPY . .
# Statements are checked against `.sqlx`: no database is needed.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --locked --release --no-default-features \
    && cp target/release/token-broker /token-broker

FROM debian:bookworm-slim
# The upstream's certificate is verified against the system's roots.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -m 0700 -o 65532 -g 65532 /var/lib/token-broker
COPY --from=build /token-broker /usr/local/bin/token-broker

# By number, so that Kubernetes can see that it is not root.
USER 65532:65532
# The audit journal: losing it loses records that Postgres has not got yet.
VOLUME /var/lib/token-broker
ENV TOKEN_BROKER_STATE_DIR=/var/lib/token-broker
EXPOSE 50051 9464
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s CMD ["token-broker", "health"]
ENTRYPOINT ["token-broker"]
CMD ["serve"]
