// Command lorakit turns model checkpoints into what their users need next. See lorakit help, or the documentation in
// docs/.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/lorakit/lorakit"
)

// The exit codes.
const (
	exitFailed      = 1   // the destination is untouched
	exitUsage       = 2   // wrong usage
	exitFound       = 3   // a check found what it was to find
	exitInterrupted = 130 // Ctrl-C or SIGTERM
)

// usageError is a command line that cannot be understood.
type usageError struct{ error }

// errFound makes the command exit with exitFound; all has been said.
var errFound = errors.New("found")

// defaultMemory is what --memory is where it is not given, or where a command has no such flag.
const defaultMemory = 256 << 20

// limitMemory has the garbage collector keep to some less than the process may use.
func limitMemory(bytes int64) { debug.SetMemoryLimit(bytes - bytes/8) }

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// writers are the commands that have a stage or a plugin to put away when they are interrupted; the others just end.
var writers = []string{"convert", "merge", "unmerge", "attach", "extract", "resize", "combine", "validate",
	"install", "test"}

// run carries out one command line and returns the exit code.
func run(args []string, stdout, stderr io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	restore := context.AfterFunc(ctx, stop) // a second signal ends the process
	out := &output{Writer: stdout}
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(out)
	wrapFlags(root, out)
	root.SetErr(stderr)
	endSoon := func() bool { return false }
	root.PersistentPreRunE = func(c *cobra.Command, _ []string) error {
		if !slices.Contains(writers, c.Name()) {
			endSoon = context.AfterFunc(ctx, func() {
				time.AfterFunc(time.Second, func() {
					fmt.Fprintln(stderr, "lorakit: "+lorakit.ErrInterrupted.Error())
					os.Exit(exitInterrupted)
				})
			})
		}
		limitMemory(defaultMemory)
		if _, err := lorakit.Kernels(); err != nil || !usesPlugins(c) {
			return err
		}
		notices, err := lorakit.LoadPlugins()
		for _, n := range notices {
			fmt.Fprintln(stderr, "note: "+escape(n))
		}
		return err
	}
	err := root.ExecuteContext(ctx)
	// Nothing more is to be interrupted: what follows ends the context itself.
	endSoon()
	restore()
	if err == nil || errors.Is(err, errFound) {
		err = cmp.Or(out.err, err)
	}
	var usage usageError
	switch {
	case err == nil:
		return 0
	case errors.Is(err, errFound):
		return exitFound
	}
	fmt.Fprintln(stderr, "lorakit: "+shorten(escape(strings.Join(strings.Fields(withHints(err)), " ")), 4000))
	switch {
	case errors.Is(err, lorakit.ErrNotFinite):
		return exitFound
	case errors.Is(err, lorakit.ErrInterrupted), errors.Is(err, context.Canceled):
		return exitInterrupted
	case errors.As(err, &usage), errors.Is(err, lorakit.ErrOption):
		return exitUsage
	}
	return exitFailed
}

// usesPlugins reports whether a command reads or writes, so that it looks for plugins.
func usesPlugins(c *cobra.Command) bool {
	if !c.HasParent() { // which shows its help
		return false
	}
	for ; c != nil; c = c.Parent() {
		if slices.Contains([]string{"version", "completion", "help", "plugin"}, c.Name()) {
			return false
		}
	}
	return true
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		Use:   "lorakit",
		Short: "Turn model checkpoints into what their users need next",
		Long: `lorakit turns model checkpoints into what their users need next: another type,
4 bits (NF4 with double quantisation) or 8, and plain weights again; LoRA adapters
merged, extracted, combined, resized, begun or converted; and the training step that
shows that the result still computes and learns.

It needs no Python and no GPU, its memory is bounded by --memory and not by the
model, and a destination appears whole or not at all.`,
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.CompletionOptions.HiddenDefaultCmd = false
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error { return usageError{orFlag(c, err)} })
	root.AddCommand(convertCommand(), mergeCommand(), unmergeCommand(), attachCommand(), extractCommand(), resizeCommand(),
		combineCommand(), inspectCommand(), diffCommand(), verifyCommand(), analyzeCommand(), estimateCommand(),
		validateCommand(), formatsCommand(), pluginCommand(),
		versionCommand())
	root.InitDefaultCompletionCmd()
	root.InitDefaultHelpCmd()
	wrongArgumentsAreUsage(root)
	for _, c := range root.Commands() {
		if c.Name() == "help" {
			c.Args = knownCommand
		}
	}
	// An unknown command is wrong usage as well.
	root.Args = func(c *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknownCommand(c, args[0])
		}
		return nil
	}
	root.RunE = func(c *cobra.Command, _ []string) error { return c.Help() }
	return root
}

// knownCommand is for help, which shows all of the help for a command that is not there.
func knownCommand(c *cobra.Command, args []string) error {
	if found, _, err := c.Root().Find(args); err != nil || found == c.Root() && len(args) > 0 {
		return unknownCommand(c.Root(), args[0])
	}
	return nil
}

// wrongArgumentsAreUsage makes a wrong number of arguments an error that shows how the command is called, and so with
// a sub-command that is not there.
func wrongArgumentsAreUsage(parent *cobra.Command) {
	for _, c := range parent.Commands() {
		check := c.Args
		c.Args = func(c *cobra.Command, args []string) error {
			if check == nil {
				return nil
			}
			if err := check(c, args); err != nil {
				return usageError{fmt.Errorf("%w; usage: %s", err, c.UseLine())}
			}
			if err := cmp.Or(c.ValidateRequiredFlags(), c.ValidateFlagGroups()); err != nil {
				return usageError{err} // cobra itself would make it a failure
			}
			return nil
		}
		if c.HasSubCommands() && !c.Runnable() {
			c.RunE = func(c *cobra.Command, args []string) error {
				if len(args) == 0 {
					return c.Help()
				}
				return unknownWord(c.Name(), args[0], commandNames(c)...)
			}
			c.Args = cobra.ArbitraryArgs
		}
		wrongArgumentsAreUsage(c)
	}
}

// helpWidth is how many columns a line of help has at most.
const helpWidth = 100

// wrapFlags breaks the lines that tell of flags.
func wrapFlags(root *cobra.Command, w io.Writer) {
	width := helpWidth
	if columns, ok := terminalWidth(w); ok {
		width = min(width, columns)
	}
	root.SetUsageTemplate(strings.ReplaceAll(root.UsageTemplate(), "FlagUsages ",
		fmt.Sprintf("FlagUsagesWrapped %d ", width)))
}

// output remembers that something could not be written, so that a full disk behind a redirection is no success.
type output struct {
	io.Writer
	err error
}

func (o *output) Write(p []byte) (int, error) {
	n, err := o.Writer.Write(p)
	if err != nil && o.err == nil {
		o.err = err
	}
	return n, err
}
