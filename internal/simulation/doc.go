// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

// Package simulation has tests only: they play seeded schedules of faults on a simulated engine and a real client, and
// hold what the client told its handler against what the engine held.
package simulation
