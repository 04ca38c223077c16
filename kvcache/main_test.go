// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package kvcache_test

import (
	"testing"

	"github.com/kvtap/kvtap/internal/leak"
)

func TestMain(m *testing.M) { leak.Main(m) }
