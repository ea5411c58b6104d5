package main

import (
	"github.com/spf13/cobra"
)

// linkFlag gives a command that reads the flag that lets links lead out of a folder.
func linkFlag(c *cobra.Command, follow *bool) {
	c.Flags().BoolVar(follow, "follow-links", false, "take links in the folders that are read to files outside of them")
}
