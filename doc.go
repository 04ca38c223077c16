// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package kvtap holds no code. It is the root of a module whose packages tell an LLM inference gateway which engine
// holds which KV-cache blocks:
//
//   - kvcache follows one engine's events over ZeroMQ and hands them on in order: the package to import first.
//   - event decodes and encodes what engines send, and folds it into what they hold.
//   - enginesim is an engine without the model, for tests.
//
// The program is github.com/kvtap/kvtap/cmd/kvtap.
package kvtap
