# One set of flags for the binary and the tests, so that they share the build cache.
# The version is stamped below: go build itself would fail where git does not work.
export CGO_ENABLED := 0
export GOFLAGS += -trimpath -buildvcs=false

COREDNS := github.com/coredns/coredns
# Empty in a source tree without git.
DESCRIBE := $(shell git describe --tags --always --dirty 2>/dev/null)
VERSION ?= $(or $(DESCRIBE),unknown)
LDFLAGS := -s -w -X $(COREDNS)/coremain.GitCommit=nodecache-$(VERSION) \
	-X github.com/contentful-labs/coredns-nodecache.Version=$(VERSION)
# What CoreDNS's own build sets: smaller, since the linker can drop unused methods.
TAGS := grpcnotrace

STATICCHECK := honnef.co/go/tools/cmd/staticcheck@v0.8.2
# Every shell script, whatever its name is.
SCRIPTS = $(shell grep -rIlE --exclude-dir=.git --exclude-dir=build '^\#!(/usr)?/bin/(env )?(ba)?sh' .)

# Debian's and Go's name of what the images run on.
ARCH ?= $(shell go env GOARCH)
# The images' name, and the release that manifests and pages take: make manifests writes both there.
IMAGE_NAME ?= ghcr.io/contentful-labs/coredns-nodecache
RELEASE := v0.1.0
# Both versions, as an image is made anew for each of the two.
COREDNS_VERSION = $(shell sed -n 's|^	$(COREDNS) v||p' go.mod)
IMAGE ?= $(IMAGE_NAME):$(VERSION)-coredns$(COREDNS_VERSION)
# Such as linux/amd64,linux/arm64; by default this machine's own.
PLATFORMS ?=
# Further arguments of `docker buildx build`, such as --push.
IMAGE_FLAGS ?= $(if $(PLATFORMS),,--load)

# Tests that run on Debian's kernel: those of the package and those end to end
# to which the kernel makes a difference, since emulation is 20 to 30 times slower.
KERNEL_RUN ?= Link|Prefer|Address|Park|Adopt|EnsureMakes|NFT|Exit|Skipteardown|Heart|CoreDNSServes
E2E_RUN ?= Dummy|LinkStaysDown|WithDefaults|ExitLeavesNodeAsItWas//empty|KillFallsThrough|IPVS
KERNEL_TIMEOUT ?= 1200

# Which of them continuity measures, by default all: such as EVENTS=SIGTERM,SIGKILL SUBJECTS=nftables.
EVENTS ?=
SUBJECTS ?=

# Which of its rows resilience shows, by words of their names; by default all.
ROWS ?=

# How often each thing is removed.
REPAIRS ?= 20

# A program of test/, which is a module of its own, run from here.
run = go build -C test -o $(CURDIR)/build/$(1) ./$(1) && build/$(1)

FUZZTIME ?= 5m
# Percent of the plugin's statements.
MIN_COVERAGE := 86

.DEFAULT_GOAL := coredns

.PHONY: coredns
coredns: ## Build ./coredns with the plugins of plugin.cfg (the default).
	go build -tags '$(TAGS)' -ldflags '$(LDFLAGS)' -o coredns ./cmd/coredns

.PHONY: full
full: ## Build ./coredns with all of CoreDNS's plugins.
	go build -tags '$(TAGS),full' -ldflags '$(LDFLAGS)' -o coredns ./cmd/coredns

.PHONY: test
test: deps coredns image-root ## Run all tests; those with network namespaces need root, and skip without.
	go test -count=1 -timeout 40m ./...
	go test -C test -count=1 -timeout 40m ./...

.PHONY: e2e
e2e: deps coredns image-root ## Run the end-to-end tests alone (needs root).
	go test -C test -count=1 -timeout 20m ./...

.PHONY: test-kernel
test-kernel: coredns ## Run the tests on Debian's kernel, which has the dummy driver, in QEMU.
	test/deps ip iptables nft xz ipvsadm
	mkdir -p build
	go test -c -o build/nodecache.test .
	go test -c -o build/sockets.test ./internal/sockets
	go test -C test -c -o ../build/e2e.test .
	IN_KERNEL_TIMEOUT=$(KERNEL_TIMEOUT) test/in-kernel \
		build/nodecache.test -test.v -test.timeout 0 -test.run '$(KERNEL_RUN)'
	IN_KERNEL_TIMEOUT=$(KERNEL_TIMEOUT) test/in-kernel \
		build/sockets.test -test.v -test.timeout 0 -test.run 'Park|Own'
	cd test && IN_KERNEL_TIMEOUT=$(KERNEL_TIMEOUT) IN_KERNEL_ENV=LAB_SCALE LAB_SCALE=0.02 ./in-kernel \
		../build/e2e.test -test.v -test.timeout 0 -test.run '$(E2E_RUN)'

# Which releases of Debian, by default bullseye, bookworm, trixie and sid.
SUITES ?=

.PHONY: test-kernels
test-kernels: KERNEL_TIMEOUT = 3600
test-kernels: coredns ## Run the kernel tests on the kernels and iptables of several releases of Debian (long).
	test/deps ip iptables nft xz ipvsadm
	KERNEL_RUN='$(KERNEL_RUN)' E2E_RUN='$(E2E_RUN)|OtherIptables|TwoIptables|WithoutOwnedTables|ThisKernel' KERNEL_TIMEOUT='$(KERNEL_TIMEOUT)' \
		test/kernels $(SUITES)

# Where test-cluster keeps what it has fetched and built.
CLUSTER := build/cluster
KUBE_VERSION = $(shell sed -n 's|.*k8s.io/kubernetes v\([0-9]\)|v\1|p' test/cluster/kube/go.mod)
KUBE_LDFLAGS = -s -w $(foreach package,component-base/version client-go/pkg/version, \
	-X k8s.io/$(package).gitVersion=$(KUBE_VERSION) -X k8s.io/$(package).gitMajor=$(word 1,$(subst ., ,$(KUBE_VERSION:v%=%))) \
	-X k8s.io/$(package).gitMinor=$(word 2,$(subst ., ,$(KUBE_VERSION))))
# One of them; by default each: iptables and nftables are kube-proxy's modes, dual-stack, ipv6 and fastpath the
# overlays, dry-run everything that an API server can look at without making it.
MODE ?=
# How the cache is there for Kubernetes' specs; by default each: single, pair, single-no-fastpath, pair-no-fastpath.
WAY ?=

# The same for each of the targets: what is built of this repository.
.PHONY: cluster-kit
cluster-kit: deps image-root $(CLUSTER)/bin/kube $(CLUSTER)/root
	go build -tags '$(TAGS),full' -ldflags '$(LDFLAGS)' -o $(CLUSTER)/bin/coredns ./cmd/coredns
	go build -C test -ldflags '-s -w' -o $(CURDIR)/$(CLUSTER)/bin/ask ./cluster/ask

.PHONY: test-cluster
test-cluster: cluster-kit $(CLUSTER)/bin/helm $(CLUSTER)/crds ## Apply the manifests, and the chart with Helm, to a Kubernetes of one node on this machine, and count lost queries (needs root).
	CLUSTER_KIT=$(CURDIR)/$(CLUSTER) go test -C test -count=1 -timeout 60m -v -run '/$(MODE)' ./cluster

.PHONY: test-e2e
test-e2e: cluster-kit $(CLUSTER)/bin/e2e.test $(CLUSTER)/bin/agnhost ## Run the DNS specs of Kubernetes' own end-to-end suite on it, without the cache and with (long, needs root).
	test/cluster/probes/root $(CLUSTER)/bin/agnhost $(CLUSTER)/bin/coredns $(CLUSTER)/probes
	CLUSTER_KIT=$(CURDIR)/$(CLUSTER) CLUSTER_SPECS=$(CURDIR)/$(CLUSTER)/bin/e2e.test \
		go test -C test -count=1 -timeout 4h -v -run 'TestKubernetesSpecs/$(MODE)/$(if $(WAY),^$(WAY)$$$$)' ./cluster

# All of Kubernetes in one binary, which takes minutes: only when its source is newer.
$(CLUSTER)/bin/kube: $(wildcard test/cluster/kube/*.*)
	cd test/cluster/kube && go build -o $(CURDIR)/$@ -ldflags '$(KUBE_LDFLAGS)' .

$(CLUSTER)/bin/e2e.test: $(wildcard test/cluster/kube/go.* test/cluster/kube/e2e/*)
	cd test/cluster/kube && go test -c -o $(CURDIR)/$@ -ldflags '$(KUBE_LDFLAGS)' ./e2e

$(CLUSTER)/bin/agnhost: $(wildcard test/cluster/kube/go.*)
	cd test/cluster/kube && go build -o $(CURDIR)/$@ -ldflags '-s -w' k8s.io/kubernetes/test/images/agnhost

$(CLUSTER)/bin/helm: $(wildcard test/cluster/helm/*)
	cd test/cluster/helm && go build -o $(CURDIR)/$@ -ldflags '-s -w' helm.sh/helm/v4/cmd/helm

# What Cilium and the Prometheus Operator say their objects are.
$(CLUSTER)/crds: test/cluster/crds
	test/cluster/crds $@.new
	rm -rf $@
	mv $@.new $@
	touch $@

# Debian's packages, which are not installed.
$(CLUSTER)/root: test/cluster/packages
	test/cluster/packages $@.new
	rm -rf $@
	mv $@.new $@
	touch $@

.PHONY: demo
demo: deps coredns ## Show the cache at work in network namespaces of this machine (needs root).
	$(call run,demo)

.PHONY: continuity
continuity: deps coredns ## Measure what clients notice of exits, crashes and the like (needs root).
	$(call run,continuity) $(if $(EVENTS),-events $(EVENTS)) $(if $(SUBJECTS),-subjects $(SUBJECTS))

.PHONY: repairs
repairs: deps coredns ## Measure how soon removed things are back, and what many addresses take (needs root).
	$(call run,continuity) -repairs $(REPAIRS) -subjects all
	build/continuity -rules -subjects all

.PHONY: repairs-kernel
repairs-kernel: coredns ## Measure repairs on Debian's kernel, which has the dummy driver, in QEMU (slow).
	test/deps ip iptables nft xz
	go build -C test -o ../build/continuity ./continuity
	IN_KERNEL_TIMEOUT=$(KERNEL_TIMEOUT) test/in-kernel build/continuity -repairs $(REPAIRS) -subjects all

.PHONY: resilience
resilience: deps coredns ## Show what a pod sees of what happens to upstreams, beside no cache and node-cache's Corefile (needs root).
	$(call run,resilience) $(if $(ROWS),-rows '$(ROWS)')

.PHONY: sizing
sizing: deps coredns ## Measure memory against cached answers and server blocks (needs root).
	$(call run,sizing)

.PHONY: limits
limits: deps coredns ## Measure descriptors, goroutines and memory at the limits (needs root).
	LAB_LIMITS=1 go test -C test -count=1 -timeout 20m -v -run TestLimits .

# For how long.
SOAK ?= 2h

.PHONY: soak
soak: deps coredns ## Reload, restart twins, meddle and silence upstreams under load for SOAK, and sample what must not grow (needs root).
	LAB_SOAK=$(SOAK) go test -C test -count=1 -timeout 0 -v -run TestSoak .

# How many reloads, and how many lives of a twin.
COUNT ?= 1000

.PHONY: lives
lives: deps coredns ## Reload COUNT times in a row, and start and end a twin as often, and compare what there is then with the start (needs root).
	LAB_LIVES=$(COUNT) go test -C test -count=1 -timeout 0 -v -run TestLives .

.PHONY: corefile
corefile: deps coredns ## Measure what the options of the manifests' Corefile are for (needs root).
	LAB_COREFILE=1 go test -C test -count=1 -timeout 20m -v -run TestCorefileTable .

# How many questions.
ANSWERS ?= 100000

.PHONY: answers
answers: deps coredns ## Compare the answers to ANSWERS (100000) questions with plain CoreDNS's and unbound's (needs root).
	test/deps unbound
	LAB_ANSWERS=$(ANSWERS) go test -C test -count=1 -timeout 20m -v -run TestAnswersTable .

.PHONY: monitoring-test
monitoring-test: deps coredns ## Test the alerts and the dashboard with Prometheus (needs root).
	test/deps promtool prometheus
	go test -C test -count=1 -timeout 10m -v -run Monitoring .

.PHONY: dashboard-picture
dashboard-picture: deps coredns ## Draw docs/dashboard.svg from real data (needs root).
	test/deps prometheus
	$(call run,picture) >docs/dashboard.svg.new
	mv docs/dashboard.svg.new docs/dashboard.svg

# Further arguments of bench, such as -subjects manifest,manifest-fastpath -rates 1000,5000.
BENCH ?=

.PHONY: bench
bench: coredns ## Measure what an answer costs, beside plain CoreDNS and the C caches that are installed (needs root).
	$(call run,bench) $(BENCH)
	go test -run '^$$' -bench Hit -cpu 1,2 -count 3 ./internal/fastpath

.PHONY: lint
lint: ## Run go vet, staticcheck, gofmt and shellcheck.
	go vet ./...
	go vet -tags full ./cmd/...
	go vet -C test ./...
	go run $(STATICCHECK) ./...
	cd test && go run $(STATICCHECK) ./...
	@files=$$(gofmt -l .); [ -z "$$files" ] || { echo "not formatted by gofmt: $$files" >&2; exit 1; }
	test/deps shellcheck
	shellcheck $(SCRIPTS)

.PHONY: race
race: deps ## Run the packages' tests with the race detector (needs a C compiler).
	CGO_ENABLED=1 go test -race -count=1 -timeout 20m . ./internal/... ./plugin/...

.PHONY: fuzz
fuzz: ## Run every fuzz test of the plugin for FUZZTIME (5m).
	for p in $$(go list ./...); do \
		for f in $$(go test -list '^Fuzz' $$p | grep '^Fuzz'); do \
			go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) $$p || exit; \
		done; \
	done

.PHONY: cover
cover: deps ## Print the coverage of the plugin's tests, and fail below 86 % (needs root).
	go test -count=1 -timeout 20m -coverprofile cover.out \
		-coverpkg $$(go list . ./internal/... ./plugin/... | grep -v /testkit | paste -sd,) . ./internal/... ./plugin/...
	@go tool cover -func cover.out | awk -v min=$(MIN_COVERAGE) \
		'/^total:/ { print "coverage:", $$3 " of statements, at least " min "% wanted"; exit $$3 + 0 < min }'

.PHONY: generate
generate: ## Write the lists of plugins that plugin.cfg asks for.
	go generate ./cmd/coredns

.PHONY: check-generated
check-generated: ## Fail if the lists of plugins are not what plugin.cfg asks for.
	cd cmd/coredns && go run ./generate -check

.PHONY: manifests
manifests: ## Write what of the manifests, the chart and the pages is made elsewhere: the images' name and release, the files of k8s/base, the Corefile, the alerts.
	sed -i -E 's#(image: ).*:v[0-9.]+-coredns[0-9.]+#\1$(IMAGE_NAME):$(RELEASE)-coredns$(COREDNS_VERSION)#' \
		k8s/base/*/*.yaml k8s/components/*/*.yaml charts/nodecache/Chart.yaml
	sed -i -E 's#(coredns-nodecache:)v[0-9.]+-coredns[0-9.]+#\1$(RELEASE)-coredns$(COREDNS_VERSION)#' README.md docs/*.md
	sed -i -E 's#^version: .*#version: $(RELEASE:v%=%)#; s#^appVersion: .*#appVersion: $(RELEASE)-coredns$(COREDNS_VERSION)#' charts/nodecache/Chart.yaml
	sed -i -E 's#^(  repository: ).*#\1$(IMAGE_NAME)#' charts/nodecache/values.yaml
	cp k8s/base/single/node-local.yaml k8s/base/ha/node-local-ha.yaml k8s
	$(call run,chart/generate)

.PHONY: sbom
sbom: coredns image-root ## Write build/sbom.json, the modules and packages of the images with their licences (CycloneDX).
	$(call run,sbom) -version $(VERSION) -root build/image/$(ARCH)/iptables ./coredns >build/sbom.json

# The database is a module too, so that this needs nothing but the module proxy.
.PHONY: vuln
vuln: ## Look for known vulnerabilities in what ./coredns calls (fails on any).
	.ci/vuln -tags '$(TAGS)' ./cmd/coredns

.PHONY: bump-coredns
bump-coredns: ## Build on CoreDNS TO (the latest), and run all checks and tests (needs root).
	.ci/bump-coredns $(TO)

.PHONY: image
image: ## Build the container images IMAGE and IMAGE-nftables, for PLATFORMS.
	docker buildx build --build-arg VERSION=$(VERSION) --target iptables --tag $(IMAGE) \
		$(if $(PLATFORMS),--platform $(PLATFORMS)) $(IMAGE_FLAGS) .
	docker buildx build --build-arg VERSION=$(VERSION) --target nftables --tag $(IMAGE)-nftables \
		$(if $(PLATFORMS),--platform $(PLATFORMS)) $(IMAGE_FLAGS) .

.PHONY: image-root
image-root: build/deb/$(ARCH) ## Lay out what the images for ARCH hold, below build/image/ARCH.
	GOARCH=$(ARCH) go build -tags '$(TAGS)' -ldflags '$(LDFLAGS)' -o build/image/coredns-$(ARCH) ./cmd/coredns
	for target in iptables nftables; do \
		image/root $$target build/image/coredns-$(ARCH) build/deb/$(ARCH) build/image/$(ARCH)/$$target || exit; \
	done

# Debian's packages of the image. Once here they stay; make clean has them fetched anew.
build/deb/%: image/packages
	image/packages $* $@.new
	rm -rf $@
	mv $@.new $@
	touch $@

.PHONY: deps
deps:
	test/deps

.PHONY: clean
clean: ## Remove what the targets above have built.
	rm -rf coredns build cover.out

.PHONY: help
help: ## Print this list.
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
