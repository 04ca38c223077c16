// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package e2e holds kvtap against a real vLLM: what event.Fold makes of the batches that kvcache hands on must equal
// what the engine's own block pool says it holds, after every single batch, whatever happens between. Its tests have
// the build tag e2e and need an engine; e2e/run installs one and runs them. README.md tells how.
package e2e
