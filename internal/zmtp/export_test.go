// Copyright 2026 The kvtap Authors
// SPDX-License-Identifier: Apache-2.0

package zmtp

// BufferSize is how many bytes the buffer holds that messages are read into. It belongs to Recv's goroutine.
func (c *Conn) BufferSize() int { return len(c.buf) }
