package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

func pluginTestCommand() *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "test NAME",
		Short: "Check that a plugin does what lorakit relies on",
		Long: `test has the plugin write and read tensors of all types, shapes and names, read broken
files, quantise weights, and end, in a folder for temporary files. It takes a few seconds,
and exits with 3 if a check fails; each that does says what the plugin's author should do.
Each check is printed as soon as it is made; Ctrl-C ends them, and shows what was found.

What a format refuses as not supported is skipped, and so are all others once the plugin
has given no answer in two checks. Files in the folder testdata or samples of the plugin's
package are read too: a format that is only read is checked with them alone.`,
		Example: `  lorakit plugin test flax
  lorakit plugin test flax --json`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completePlugin,
		RunE: func(c *cobra.Command, args []string) error {
			w := c.OutOrStdout()
			if asJSON {
				r, err := lorakit.TestPlugin(c.Context(), args[0], lorakit.TestPluginOptions{})
				if err != nil {
					return err
				}
				if err := printJSON(w, r); err != nil {
					return err
				}
				return found(r)
			}
			rows := checkRows{w: w}
			r, err := lorakit.TestPlugin(c.Context(), args[0], lorakit.TestPluginOptions{Done: rows.add})
			if r == nil {
				return err
			}
			rows.end(r, err != nil)
			if err != nil {
				return err
			}
			return found(r)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "print one JSON object")
	return c
}

// found makes the command say by its exit code that a check has failed.
func found(r *lorakit.PluginTest) error {
	if r.Failed > 0 {
		return errFound
	}
	return nil
}

// checkRows prints checks as they are made. Those of roundtrip-DTYPE that say the same become one row, unless they have
// passed.
type checkRows struct {
	w    io.Writer
	wide int      // the columns of a detail
	held []folded // what is not printed yet
	all  []folded
}

// folded are checks that say the same.
type folded struct {
	lorakit.PluginCheck
	more int // beside the one
}

func (f folded) name() string {
	if f.more == 0 {
		return f.ID
	}
	return fmt.Sprintf("%s and %d more", f.ID, f.more)
}

// same reports whether two checks say the same of two types.
func (f folded) same(x lorakit.PluginCheck) bool {
	return f.Status == x.Status && f.Detail == x.Detail
}

// checkWidth is the width of most ids, and of most that stand for several.
const checkWidth = 25

func (r *checkRows) row(id, status, detail string) {
	if r.wide == 0 {
		r.wide = longestName
		if columns, ok := terminalWidth(r.w); ok {
			r.wide = min(longestName, max(leastName, columns-checkWidth-len("  skipped  ")))
		}
		r.row("CHECK", "STATUS", "DETAIL")
	}
	fmt.Fprintf(r.w, "%-*s  %-7s  %s\n", checkWidth, id, status, shorten(escape(detail), r.wide))
}

// add takes in a check.
func (r *checkRows) add(x lorakit.PluginCheck) {
	if !strings.HasPrefix(x.ID, "roundtrip-") {
		r.flush()
	} else if x.Status != lorakit.CheckPassed {
		if i := slices.IndexFunc(r.held, func(f folded) bool { return f.same(x) }); i >= 0 {
			r.held[i].more++
		} else {
			r.held = append(r.held, folded{PluginCheck: x})
		}
		return
	}
	r.all = append(r.all, folded{PluginCheck: x})
	r.row(x.ID, string(x.Status), x.Detail)
}

// flush prints what was held back.
func (r *checkRows) flush() {
	for _, f := range r.held {
		r.row(f.name(), string(f.Status), f.Detail)
	}
	r.all = append(r.all, r.held...)
	r.held = nil
}

// end prints what is to be done, and how many checks there were.
func (r *checkRows) end(t *lorakit.PluginTest, interrupted bool) {
	r.flush()
	for _, f := range r.all {
		if f.Status == lorakit.CheckFailed {
			fmt.Fprintf(r.w, "\n%s: %s\n  %s\n", f.name(), escape(f.Detail), escape(f.Advice))
		}
	}
	so := ""
	if interrupted {
		so = " when it was interrupted"
	}
	fmt.Fprintf(r.w, "\n%s: %d passed, %d failed, %d skipped%s\n", escape(t.Name), t.Passed, t.Failed, t.Skipped, so)
}
