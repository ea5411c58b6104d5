package main

import (
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/lorakit/lorakit"
)

// TestPlanSize says of files whose sizes nobody knows yet what they take while they are written.
func TestPlanSize(t *testing.T) {
	shard := func(name, size, elements string) string {
		return `{"name": "` + name + `", "size": ` + size + `, "header": "", "jobs": [{"weight": "w", "dtype": "U8", ` +
			`"outputs": [{"name": "w", "dtype": "U8", "shape": [` + elements + `], "offset": 0}]}]}`
	}
	for shards, says := range map[string]string{
		shard("a", "5000", "4096"): "1 shard, 4.9 KiB; nothing was written\n",
		shard("a", "-1", "4096") + "," + shard("b", "-1", "2048"): "2 shards, 6.0 KiB of tensors, in files whose size is " +
			"known when h5 has written them; until then at most 4.0 KiB of scratch space beside them; nothing was written\n",
		shard("a", "-1", "0"): "1 shard, 0 B of tensors, in files whose size is known when h5 has written them; until then " +
			"at most 0 B of scratch space beside them; nothing was written\n",
	} {
		var p lorakit.Plan
		require.NoError(t, json.Unmarshal([]byte(`{"format": "h5", "shards": [`+shards+`]}`), &p))
		var out strings.Builder
		require.NoError(t, printPlan(&out, &lorakit.ConvertResult{Plan: &p}))
		assert.True(t, strings.HasSuffix(out.String(), says), out.String())
	}
}
