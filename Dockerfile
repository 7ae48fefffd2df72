# The image of coredns with nodecache, for any architecture that Debian and Go have:
#
#     docker buildx build --platform linux/amd64,linux/arm64 .
#
# The base images are pinned by version. To pin the very bytes too append the digest that
# `docker buildx imagetools inspect IMAGE` prints: golang:1.26-bookworm@sha256:...

ARG GO_IMAGE=golang:1.26-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

# Go compiles for another architecture as fast as for its own, an emulated Go does not.
FROM --platform=$BUILDPLATFORM ${GO_IMAGE} AS build
WORKDIR /src
# By themselves, so that a change of the source does not download all modules again.
COPY go.mod go.sum ./
RUN go mod download
COPY . .
ARG TARGETOS TARGETARCH
# The source comes without git; `make image` passes what git knows.
ARG VERSION=unknown
RUN GOOS=$TARGETOS GOARCH=$TARGETARCH make VERSION="$VERSION"

FROM ${BASE_IMAGE}
# Both variants of iptables: which one the node uses shows itself at the start. The
# certificates are for upstreams that are asked over TLS.
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates iptables \
    && rm -rf /var/lib/apt/lists/*
COPY image/layout image/entrypoint /usr/lib/nodecache/
RUN /usr/lib/nodecache/layout /usr/lib/nodecache/iptables
COPY --from=build /src/coredns /usr/bin/coredns

# Root, since the capabilities that a container adds reach no other user's processes. It
# takes NET_ADMIN, NET_RAW for legacy iptables, and NET_BIND_SERVICE; drop all others.
USER 0:0
WORKDIR /
ENTRYPOINT ["/usr/lib/nodecache/entrypoint"]
CMD ["-conf", "/etc/coredns/Corefile"]
