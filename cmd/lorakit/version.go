package main

import (
	"fmt"
	"math"
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

// schemeColumns is what is left of a list of types.
const schemeColumns = 31

// wrapped joins words to lines of at most so many columns, where a word has no more.
func wrapped(words []string, columns int) (lines []string) {
	for _, word := range words {
		if n := len(lines); n > 0 && len(lines[n-1])+1+len(word) <= columns {
			lines[n-1] += " " + word
		} else {
			lines = append(lines, word)
		}
	}
	return lines
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
			columns, ok := terminalWidth(w)
			if !ok {
				columns = math.MaxInt
			}
			t = newTable(w, "SCHEME", "", "TYPES")
			for _, s := range r.Schemes {
				name := s.Name
				for state, types := range [][]string{s.Types, s.ReadOnly} {
					for _, line := range wrapped(types, columns-schemeColumns) {
						t.row(name, []string{"", "read only"}[state], line)
						name = ""
					}
				}
			}
			t.flush()
			fmt.Fprintln(w)
			for i, line := range wrapped(r.GGUF.FileTypes, columns-schemeColumns) {
				fmt.Fprintln(w, []string{"file types of GGUF:", strings.Repeat(" ", 19)}[min(i, 1)], line)
			}
			fmt.Fprintf(w, "\n%d architectures of transformers are known, %d of them to GGUF; --json lists them\n",
				len(r.Architectures), len(r.GGUF.Architectures))
			return nil
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}
