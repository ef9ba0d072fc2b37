# The front door. `make demo` and `make test` need nothing but a clone on Debian 12 or Ubuntu 24.04.
.PHONY: demo test test-clients image-test compose-test readme-test docs build check-full bench format format-check lint clean packages
JOBS ?= $(shell nproc)

# Builds if needed, runs two backends and one server with the bundled model, asks one question, stops everything.
demo: build
	@scripts/demo.sh build/release/apps/caravan models/demo.gguf

build: packages
	@cmake --preset release -DCARAVAN_TESTS=OFF >build.log 2>&1 || { cat build.log; exit 1; }
	@rm -f build.log
	@cmake --build build/release -j $(JOBS) --target caravan

packages:
	@scripts/packages.sh build

# Builds and runs every test; prints run and skipped counts per suite.
test: packages
	@cmake --preset release -DCARAVAN_TESTS=ON >/dev/null
	@cmake --build build/release -j $(JOBS)
	@scripts/run_tests.py build/release

# A session of the OpenAI and Anthropic clients, and docs/openapi.yaml against real answers. Needs Node.js and npm.
test-clients: build
	@scripts/run_tests.py build/release --e2e-only --filter clients

# Builds the container images without a container engine and tries them, on amd64, arm64 and arm/v7. Needs root, takes an hour on 2 cores;
# `scripts/image_test.sh amd64` is one of them.
image-test:
	@scripts/image_test.sh

# docker-compose.yml with that image, also without an engine.
compose-test:
	@scripts/compose_test.sh

# What README says of containers, to the letter, with Docker's engine in namespaces of its own. Needs root.
readme-test:
	@scripts/readme_test.sh

# What takes longer than a push should: ThreadSanitizer, clang, cross builds under emulation, long fuzzing.
check-full:
	@scripts/check_full.sh

# The table of prompt and generation speed against the machine's limits.
bench: build
	@scripts/bench.sh build/release/apps/caravan

format:
	@git ls-files '*.h' '*.cpp' '*.inc' | xargs clang-format-19 -i

format-check:
	@git ls-files '*.h' '*.cpp' '*.inc' | xargs clang-format-19 --dry-run -Werror
	@scripts/check_includes.py
	@scripts/check_docs.py

lint:
	@scripts/packages.sh check
	@cmake --preset clang >/dev/null
	@cmake --build build/clang -j $(JOBS) --target caravan
	@git ls-files 'src/*.cpp' 'apps/*.cpp' | xargs -P $(JOBS) -n 4 clang-tidy-19 --quiet -p build/clang

# docs/options.md from --help; the tests compare it.
docs: build
	@scripts/check_docs.py --write build/release/apps/caravan

clean:
	@rm -rf build
