# The images of coredns with nodecache:
#
#     docker buildx build --platform linux/amd64,linux/arm64 --target iptables .
#     docker buildx build --platform linux/amd64,linux/arm64 --target nftables .
#
# The first has both variants of iptables; coredns chooses the node's own at its start. The
# second has nothing but coredns, for firewall nftables. `make image-root` lays out what is
# in them, here and on any Debian without Docker.
#
# The base image is pinned by version. To pin the very bytes too append the digest that
# `docker buildx imagetools inspect IMAGE` prints: golang:1.26-bookworm@sha256:...

ARG GO_IMAGE=golang:1.26-bookworm

# Go compiles for another architecture as fast as for its own, and Debian's packages are
# only unpacked, so nothing is emulated.
FROM --platform=$BUILDPLATFORM ${GO_IMAGE} AS build
WORKDIR /src
ARG TARGETARCH
COPY Makefile .
COPY image image
# By themselves, so that a change of the source does not fetch everything again.
RUN make build/deb/$TARGETARCH
COPY go.mod go.sum ./
RUN go mod download
COPY . .
# The source comes without git; `make image` passes what git knows.
ARG VERSION=unknown
RUN make image-root ARCH=$TARGETARCH VERSION="$VERSION" && mv build/image/$TARGETARCH /root-of

# Both run as root, since the capabilities that a container adds reach no other user's
# processes: NET_ADMIN and NET_BIND_SERVICE, and for legacy iptables NET_RAW.
FROM scratch AS nftables
COPY --from=build /root-of/nftables /
ENV PATH=/usr/bin
USER 0:0
WORKDIR /
ENTRYPOINT ["/usr/bin/coredns"]
CMD ["-conf", "/etc/coredns/Corefile"]

FROM scratch AS iptables
COPY --from=build /root-of/iptables /
ENV PATH=/usr/sbin:/usr/bin:/sbin:/bin
USER 0:0
WORKDIR /
ENTRYPOINT ["/usr/bin/coredns"]
CMD ["-conf", "/etc/coredns/Corefile"]
