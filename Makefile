# What a developer and CI run. Everything that is installed or built goes into git-ignored folders of the project.
GOLANGCI_VERSION := v2.15.0
GOLANGCI := .bin/golangci-lint-$(GOLANGCI_VERSION)
FUZZTIME ?= 10s
TARGETS := linux/amd64 linux/arm64 darwin/arm64 darwin/amd64 windows/amd64

BUF_VERSION := 1.75.0
PROTOC_GEN_GO_VERSION := v1.36.12
PROTOC_GEN_GO_GRPC_VERSION := v1.6.2

.PHONY: build test purego race lint fuzz cross arm64 generate proto interop keras bench costs fixtures

build:
	CGO_ENABLED=0 go build -trimpath -o lorakit ./cmd/lorakit

test:
	go test ./...

# The pure Go twins of the kernels, as other processors run them.
purego:
	go test -tags purego ./ggml/... ./internal/kernels/... ./nf4/... ./quant/... ./tensor/...

race:
	CGO_ENABLED=1 GORACE=atexit_sleep_ms=10 go test -race -timeout 20m ./...

lint: $(GOLANGCI)
	go vet ./...
	$(GOLANGCI) run ./...

$(GOLANGCI):
	GOBIN=$(CURDIR)/.bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION)
	mv .bin/golangci-lint $@

# Every fuzz target of the module, one after the other, FUZZTIME each.
fuzz:
	.ci/fuzz $(FUZZTIME)

cross:
	@set -e; for target in $(TARGETS); do \
	  echo "== $$target"; \
	  CGO_ENABLED=0 GOOS=$${target%/*} GOARCH=$${target#*/} go vet ./...; \
	  CGO_ENABLED=0 GOOS=$${target%/*} GOARCH=$${target#*/} go build -o /dev/null ./cmd/lorakit; \
	done
	go build -gcflags='all=-N -l' -o /dev/null ./plugins/examples/raw  # as a debugger builds what imports lorakit

# The same bytes on another kind of processor, by an emulator (qemu-user-static), which takes ten times as long: of the
# root's tests those that hold bytes.
arm64:
	GOARCH=arm64 go test -exec qemu-aarch64-static -run 'Golden|SameBytes|As(PEFT|Numpy)' .
	GOARCH=arm64 go test -exec qemu-aarch64-static ./formats/... ./ggml ./internal/kernels ./models ./nf4 ./quant/... ./storage ./tensor

# Generated code is what its generator makes.
generate:
	go generate ./internal/kernels
	git diff --exit-code -- internal/kernels

# The protocol of plugins keeps to buf's rules, breaks nothing that was there in baseline.binpb, and its code is what is
# generated from it. A change that only adds has a new baseline: buf build plugins/proto -o plugins/proto/baseline.binpb
proto: .bin/buf-$(BUF_VERSION)
	.bin/buf-$(BUF_VERSION) lint plugins/proto
	.bin/buf-$(BUF_VERSION) breaking plugins/proto --against plugins/proto/baseline.binpb
	cd plugins/proto && PATH="$(CURDIR)/.bin:$$PATH" $(CURDIR)/.bin/buf-$(BUF_VERSION) generate
	git diff --exit-code -- plugins/proto

# The package of npm has the program in it.
.bin/buf-$(BUF_VERSION):
	mkdir -p .bin
	npm install --silent --no-save --prefix .bin/npm @bufbuild/buf@$(BUF_VERSION)
	GOBIN=$(CURDIR)/.bin go install google.golang.org/protobuf/cmd/protoc-gen-go@$(PROTOC_GEN_GO_VERSION)
	GOBIN=$(CURDIR)/.bin go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@$(PROTOC_GEN_GO_GRPC_VERSION)
	ln -sf npm/node_modules/.bin/buf $@

# transformers, bitsandbytes and safetensors read what lorakit writes.
interop: build
	python=$$(interop/setup) && $$python interop/run.py ./lorakit

# The package for plugins in Python, and the plugin keras, alone and as lorakit runs it.
keras: build
	python=$$(interop/setup) && plugins/examples/keras/check $$python ./lorakit

# lorakit against its peers in one run. BENCH="--markdown" for the table of the README.
bench: build
	python=$$(interop/setup) && $$python bench/run.py ./lorakit $(BENCH)

# What each quantised type costs on real weights: the table of docs/choosing.md.
costs: build
	python=$$(interop/setup) && $$python bench/costs.py ./lorakit

# Writes the fixtures again, to the same bytes.
fixtures:
	python=$$(interop/setup) && $$python fixtures/generate/checkpoints.py fixtures && $$python fixtures/generate/quantized.py fixtures && $$python fixtures/generate/runtime.py fixtures && $$python fixtures/generate/layouts.py fixtures && \
	  $$python fixtures/generate/pickles.py fixtures/pytorch && $$python fixtures/generate/adapters.py fixtures/adapters && $$python fixtures/generate/dialects.py fixtures/adapters && \
	  $$python fixtures/generate/others.py fixtures/adapters && $$python fixtures/generate/targets.py fixtures/adapters && \
	  $$python fixtures/generate/beside.py fixtures/adapters && \
	  $$python fixtures/generate/attach.py fixtures/attach && $$python fixtures/generate/analyze.py fixtures && \
	  $$python fixtures/generate/pyregex.py fixtures/pyregex && $$python fixtures/generate/specs.py fixtures && \
	  $$python fixtures/generate/steps.py fixtures/steps && $$python fixtures/generate/ggufs.py fixtures/gguf
