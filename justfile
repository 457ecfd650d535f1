# Each recipe is one line of cargo, so `just` itself is optional.

# what continuous integration runs, in the same order
check: fmt clippy tidy docs test

# formatting
fmt:
    cargo fmt --all --check

# lints
clippy:
    cargo clippy --workspace --all-targets --locked -- -D warnings

# house rules
tidy:
    cargo xtask tidy

# whether the generated pages are fresh; `cargo xtask docs` writes them
docs:
    cargo xtask docs --check

# all tests
test:
    cargo test --workspace --locked

# licences, bans and sources of the dependencies; needs cargo-deny
deny:
    cargo deny check bans licenses sources

# trains the example
example:
    cargo run --release -- run examples/shakespeare/job.toml

# 100,000 random schedules of the coordinator's rules, 1,000 of the crew over a simulated network; ten minutes
simulate:
    cargo xtask simulate

# 1,000 faults on real processes; the better part of an hour, as root with links cut and a disk filled
chaos:
    cargo xtask chaos

# the coordinator under 8 to 1,024 simulated workers
load:
    cargo xtask load
