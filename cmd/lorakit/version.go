package main

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func versionCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "version",
		Short:   "Print the version, and which inner loops this machine runs",
		Example: `  lorakit version`,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			kernels, _ := lorakit.Kernels()
			if asJSON {
				return printJSON(c.OutOrStdout(), struct {
					Version  string `json:"version"`
					Go       string `json:"go"`
					Platform string `json:"platform"`
					Kernels  string `json:"kernels"`
				}{lorakit.Version, runtime.Version(), runtime.GOOS + "/" + runtime.GOARCH, kernels})
			}
			fmt.Fprintf(c.OutOrStdout(), "lorakit %s (%s, %s/%s, %s kernels)\n", lorakit.Version, runtime.Version(),
				runtime.GOOS, runtime.GOARCH, kernels)
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

func formatsCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:     "formats",
		Short:   "List the formats, quantisation types and architectures that are known",
		Example: `  lorakit formats`,
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			r, err := lorakit.Formats()
			if err != nil {
				return err
			}
			w := c.OutOrStdout()
			if asJSON {
				return printJSON(w, r)
			}
			t := newTable(w, "FORMAT", "EXTENSIONS", "")
			for _, f := range r.Formats {
				note := ""
				if f.ReadOnly {
					note = "read only"
				}
				t.row(f.Name, strings.Join(f.Extensions, " "), note)
			}
			t.flush()
			fmt.Fprintln(w)
			t = newTable(w, "SCHEME", "TYPES")
			for _, s := range r.Schemes {
				t.row(s.Name, strings.Join(s.Types, " "))
				if len(s.ReadOnly) > 0 {
					t.row("", strings.Join(s.ReadOnly, " ")+" (read only)")
				}
			}
			t.flush()
			fmt.Fprintf(w, "\nfile types of GGUF: %s\n", strings.Join(r.GGUF.FileTypes, " "))
			fmt.Fprintf(w, "\n%d architectures of transformers are known, %d of them to GGUF; --json lists them\n",
				len(r.Architectures), len(r.GGUF.Architectures))
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}
