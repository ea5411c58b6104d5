package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/lorakit/lorakit/internal/nearest"
)

// unknownWord is the error of a value that is none of those that are known: it names the nearest.
func unknownWord(what, word string, known ...string) error {
	return usageError{fmt.Errorf("%s %q is unknown; known are %s%s", what, word, strings.Join(known, ", "),
		nearest.Suggestion(word, known))}
}

// oneOf refuses a flag's value that is none of those that are known.
func oneOf(flag, value string, known ...string) error {
	if slices.Contains(known, value) {
		return nil
	}
	return unknownWord("--"+flag, value, known...)
}

// commandNames lists the commands below one.
func commandNames(c *cobra.Command) []string {
	var names []string
	for _, sub := range c.Commands() {
		names = append(names, sub.Name())
	}
	return names
}

// unknownCommand names the command that is nearest to one that is not there.
func unknownCommand(root *cobra.Command, name string) error {
	hint := nearest.Suggestion(name, commandNames(root))
	if hint == "" {
		hint = "; lorakit help lists them"
	}
	return usageError{fmt.Errorf("unknown command %q%s", name, hint)}
}

// orFlag says of an unknown flag which one of the command is nearest.
func orFlag(c *cobra.Command, err error) error {
	unknown, ok := errors.AsType[*pflag.NotExistError](err)
	if !ok {
		return err
	}
	name := unknown.GetSpecifiedName()
	if short := unknown.GetSpecifiedShortnames(); short != "" { // -quantize
		name = short
	}
	var flags []string
	c.Flags().VisitAll(func(f *pflag.Flag) { flags = append(flags, f.Name) })
	if near, ok := nearest.To(name, flags); ok {
		return fmt.Errorf("%w%s", err, nearest.Hint("--"+near))
	}
	return err
}
