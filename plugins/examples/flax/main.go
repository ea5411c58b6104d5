// Command lorakit-flax is a plugin of lorakit that reads and writes the checkpoints of Flax, see README.md.
package main

import "github.com/lorakit/lorakit/plugins/sdk"

func main() {
	sdk.Serve(sdk.Plugin{Name: "flax", Version: "1.0.0", Formats: []sdk.Format{format{}}, Deterministic: true})
}
